"""Counts in a small memory-mapped file: one process adds to them, others read, and none of these exports twice."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vllm_cospec.kernels.scores import NUM_BINS

MOST_OVERRIDES = 64  # of a response, that are told apart


class SharedCounts:
    """A row of int64 counts, and behind it the same row as already exported.

    The path has no lock on the writer's side and survives several readers: what one of them has exported is marked in
    the file, and none exports it again.
    """

    def __init__(self, path: Path, length: int):
        self.path = path
        self._length = length
        self._values: np.memmap | None = None
        self._file: Any = None

    def open(self, create: bool) -> bool:
        """Map the file; returns False when it does not exist and ``create`` is False."""
        if self._values is not None:
            return True
        size = 2 * self._length
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(size * 8)
        elif not self.path.exists() or self.path.stat().st_size != size * 8:
            return False
        self._file = self.path.open("r+b")  # kept open: the lock outlives a cleaner of temporary directories
        self._values = np.memmap(self._file, np.int64, "r+", shape=(size,))
        return True

    def _row(self) -> np.ndarray:
        """Return what was counted since the engine started, int64 [N]."""
        return self._snapshot() if self.open(create=False) else np.zeros(self._length, np.int64)

    def _take(self) -> np.ndarray:
        """Return what no process has taken yet, int64 [N], and mark it taken."""
        if not self.open(create=False):
            return np.zeros(self._length, np.int64)
        with self._locked():
            values = self._mapped()
            now = self._snapshot()
            new = now - values[self._length :]
            values[self._length :] = now
        return new

    def _mapped(self) -> np.ndarray:
        assert self._values is not None
        return self._values

    def _snapshot(self) -> np.ndarray:
        """Copy the counts."""
        return self._mapped()[: self._length].copy()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


class WatchTotals(NamedTuple):
    """What an engine's scheduler has counted of responses."""

    alarms: int
    overrides: np.ndarray  # [MOST_OVERRIDES + 1] int64, responses with so many; the last entry: or more
    scores: np.ndarray  # [NUM_BINS] int64, of the arbiter, see vllm_cospec.kernels.scores


class WatchCounters(SharedCounts):
    """Of one engine's responses that have ended: alarms of the drift test, overrides, scores."""

    def __init__(self, directory: str, engine: int):
        super().__init__(Path(directory) / f"watch-{engine}", 1 + MOST_OVERRIDES + 1 + NUM_BINS)

    def count_alarm(self) -> None:
        """Count an alarm of the drift test."""
        self._mapped()[0] += 1

    def count_response(self, overrides: int, scores: np.ndarray) -> None:
        """Count a response; ``scores`` is the histogram of its scores, int64 [NUM_BINS]."""
        values = self._mapped()
        values[1 + min(overrides, MOST_OVERRIDES)] += 1
        values[2 + MOST_OVERRIDES : 2 + MOST_OVERRIDES + len(scores)] += scores

    def take_unexported(self) -> WatchTotals:
        """Return what no process has taken yet, and mark it taken."""
        new = self._take()
        return WatchTotals(int(new[0]), new[1 : 2 + MOST_OVERRIDES], new[2 + MOST_OVERRIDES :])
