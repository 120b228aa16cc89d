"""Counters: mismatches, overrides, overrides per position, unhealthy positions, from the worker to ``/metrics``.

The worker counts in a small memory-mapped file, the API server reads it when vLLM reports its own speculative-decoding
counters. So the path has no lock on the worker's side, no message per step, and survives several API servers: what one
of them has exported is marked in the file, and none exports it again. The file lies in a directory that the process
which built the configuration creates and removes; workers on other machines cannot reach it and are not counted.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import Gauge, Histogram
from vllm.logger import init_logger
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingProm

from vllm_cospec.config import Settings
from vllm_cospec.health import REASONS
from vllm_cospec.kernels.scores import SCORE_EDGES
from vllm_cospec.shared_counts import SharedCounts, WatchCounters

logger = init_logger("vllm.cospec.metrics")

DIRECTORY_VARIABLE = "COSPEC_COUNTERS"
"""``PID:DIRECTORY``, for child processes: the API servers of one server share a directory. Not a setting for users."""


def counters_directory() -> str:
    """Return the directory for the counters of the engine being configured.

    A process that configures an engine of its own gets a new one; a child process of a server gets its parent's.
    """
    pid, _, inherited = os.environ.get(DIRECTORY_VARIABLE, "").partition(":")
    if inherited and pid != str(os.getpid()) and Path(inherited).is_dir():
        return inherited
    directory = tempfile.mkdtemp(prefix="vllm-cospec-")
    os.environ[DIRECTORY_VARIABLE] = f"{os.getpid()}:{directory}"
    # in this process alone, and also where it is a child of multiprocessing, which does without atexit
    Finalize(None, shutil.rmtree, (directory,), {"ignore_errors": True}, exitpriority=0)
    return directory


class Totals(NamedTuple):
    """What the workers of an engine have counted."""

    mismatches: int
    overrides: np.ndarray  # [K] int64, at each position of a block
    unhealthy: np.ndarray  # [R] int64, in the order of REASONS

    @classmethod
    def of(cls, row: np.ndarray) -> Totals:
        """Read a row of a file, int64 [K + 1 + R]."""
        k = len(row) - 1 - len(REASONS)
        return cls(int(row[k]), row[:k], row[k + 1 :])


class Counters(SharedCounts):
    """The counters of one engine, shared between processes.

    Layout: overrides at each of K positions, mismatches, positions verified strictly for each of R reasons. Of the
    tensor-parallel ranks, which all decide alike, one writes; data-parallel ranks are engines with files of their own.
    Mismatches stand after the overrides and are written first, so a reader never sees more overrides than mismatches.
    """

    def __init__(self, directory: str, engine: int, num_positions: int):
        super().__init__(Path(directory) / f"engine-{engine}", num_positions + 1 + len(REASONS))
        self.num_positions = num_positions

    def add(self, num_mismatches: int, overrides: np.ndarray, unhealthy: np.ndarray | None = None) -> None:
        """Count; called by the one worker that owns the file.

        Args:
            num_mismatches: of arbitrated requests.
            overrides: int [K], or less, at each position of a block.
            unhealthy: int [R], positions verified strictly for each of ``REASONS``; None for none.
        """
        values = self._mapped()
        values[self.num_positions] += num_mismatches
        values[: len(overrides)] += overrides
        if unhealthy is not None:
            values[self.num_positions + 1 : self._length] += unhealthy

    def totals(self) -> Totals:
        """Return what was counted since the engine started."""
        return Totals.of(self._row())

    def take_unexported(self) -> Totals:
        """Return what no process has taken yet, and mark it taken."""
        return Totals.of(self._take())

    def _snapshot(self) -> np.ndarray:
        """Copy overrides, then the rest: one copy of both may read its tail first."""
        values = self._mapped()
        now = np.empty(self._length, np.int64)
        now[: self.num_positions] = values[: self.num_positions]
        now[self.num_positions :] = values[self.num_positions : self._length]
        return now


def counters_of_this_rank(settings: Settings, engine: int) -> Counters | None:
    """Open an engine's counters on one of its tensor-parallel ranks: all decide alike, one of them counts."""
    from vllm.distributed.parallel_state import get_tp_group

    if not get_tp_group().is_first_rank:
        return None
    counters = Counters(settings.counters, engine, settings.num_speculative_tokens)
    counters.open(create=True)
    return counters


class CoSpecDecodingProm(SpecDecodingProm):
    """vLLM's Prometheus counters of speculative decoding, and this package's beside them."""

    _gauge_cls, _histogram_cls = Gauge, Histogram

    def __init__(
        self,
        speculative_config: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        is_diffusion: bool = False,
    ):
        super().__init__(speculative_config, labelnames, per_engine_labelvalues, is_diffusion)
        settings = getattr(speculative_config, "cospec", None)
        self.cospec: dict[int, Counters] = {}
        self.cospec_watch: dict[int, WatchCounters] = {}
        self.cospec_alarms: dict[int, Any] = {}
        self.cospec_scores: dict[int, Any] = {}
        if settings is None:
            return
        k = settings.num_speculative_tokens
        self.cospec = {engine: Counters(settings.counters, engine, k) for engine in per_engine_labelvalues}
        self.cospec_mismatches = self._counters(
            "vllm:cospec_num_mismatches",
            "Draft positions of arbitrated requests that strict verification rejects.",
            labelnames,
            per_engine_labelvalues,
        )
        self.cospec_overrides = self._counters(
            "vllm:cospec_num_overrides",
            "Mismatches where the draft token was kept.",
            labelnames,
            per_engine_labelvalues,
        )
        per_position = self._counter_cls(
            name="vllm:cospec_num_overrides_per_pos",
            documentation="Overrides per draft position.",
            labelnames=[*labelnames, "position"],
        )
        self.cospec_per_position = {
            engine: [per_position.labels(*values, str(position)) for position in range(k)]
            for engine, values in per_engine_labelvalues.items()
        }
        unhealthy = self._counter_cls(
            name="vllm:cospec_num_unhealthy",
            documentation="Draft positions of arbitrated requests verified strictly because the draft was not whole.",
            labelnames=[*labelnames, "reason"],
        )
        self.cospec_unhealthy = {
            engine: [unhealthy.labels(*values, reason.value) for reason in REASONS]
            for engine, values in per_engine_labelvalues.items()
        }

        self._inform(settings.described(), labelnames, per_engine_labelvalues)
        if settings.counts_requests:
            self._watch(settings, labelnames, per_engine_labelvalues)

    def _watch(self, settings: Settings, labelnames: list[str], values: dict[int, list[object]]) -> None:
        """Export what is counted of responses, where they are."""
        self.cospec_watch = {engine: WatchCounters(settings.counters, engine) for engine in values}
        if settings.traffic is not None:
            self.cospec_alarms = self._counters(
                "vllm:cospec_num_drift_alarms",
                "Times that requests were found to be unlike those of calibration.",
                labelnames,
                values,
            )
        overrides = self._histogram_cls(
            name="vllm:cospec_overrides_per_response",
            documentation="Overrides of each response that has ended; more than 64 count as 64 in the sum.",
            labelnames=labelnames,
            buckets=(0, 1, 2, 4, 8, 16, 32, 63),
        )
        self.cospec_responses = {engine: overrides.labels(*labels) for engine, labels in values.items()}
        if settings.counts_scores:
            scores = self._histogram_cls(
                name="vllm:cospec_score",
                documentation="Scores of the arbiter; its sum is of the middles of the buckets.",
                labelnames=labelnames,
                buckets=SCORE_EDGES,
            )
            self.cospec_scores = {engine: scores.labels(*labels) for engine, labels in values.items()}

    def _observe_watch(self, engine: int) -> None:
        """Export what was counted of responses since the last call."""
        new = self.cospec_watch[engine].take_unexported()
        if engine in self.cospec_alarms:
            self.cospec_alarms[engine].inc(new.alarms)
        _observe(self.cospec_responses[engine], np.arange(len(new.overrides)), new.overrides)
        if engine in self.cospec_scores:
            edges = np.array([0.0, *SCORE_EDGES, 1.0])
            _observe(self.cospec_scores[engine], (edges[1:] + edges[:-1]) / 2, new.scores)

    def _inform(self, described: dict[str, Any], labelnames: list[str], values: dict[int, list[object]]) -> None:
        """Export the settings as labels of a gauge that is 1."""
        own = {
            name: ",".join(value) if isinstance(value, list) else "" if value is None else str(value).lower()
            for name, value in described.items()
            if name != "arbiter"  # a path of the machine's
        }
        gauge = self._gauge_cls(
            name="vllm:cospec_info",
            documentation="What is served; 1. lossy: output can differ from the target's own.",
            labelnames=[*labelnames, *own],
            multiprocess_mode="mostrecent",
        )
        for labels in values.values():
            gauge.labels(*labels, *own.values()).set(1)

    def _counters(self, name: str, text: str, labelnames: list[str], values: dict[int, list[object]]) -> dict[int, Any]:
        counter = self._counter_cls(name=name, documentation=text, labelnames=labelnames)
        return create_metric_per_engine(counter, values)

    def observe(self, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        """Export vLLM's counters and what this engine's worker has counted since the last call."""
        super().observe(spec_decoding_stats, engine_idx)
        if engine_idx not in self.cospec:
            return
        if engine_idx in self.cospec_watch:
            self._observe_watch(engine_idx)
        new = self.cospec[engine_idx].take_unexported()
        self.cospec_mismatches[engine_idx].inc(new.mismatches)
        self.cospec_overrides[engine_idx].inc(int(new.overrides.sum()))
        for counters, values in (
            (self.cospec_per_position[engine_idx], new.overrides),
            (self.cospec_unhealthy[engine_idx], new.unhealthy),
        ):
            for counter, value in zip(counters, values, strict=True):
                counter.inc(int(value))


def _observe(histogram: Any, values: np.ndarray, counts: np.ndarray) -> None:
    """Let a histogram see each value as often as it was counted."""
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        for _ in range(count):
            histogram.observe(value)


def log_line(stat_logger: Any) -> str | None:
    """Return the periodic log line of one of vLLM's logging stat loggers, or None when nothing was counted since.

    Args:
        stat_logger: a LoggingStatLogger; the totals of the last call are kept on it.
    """
    settings = getattr(stat_logger.vllm_config.speculative_config, "cospec", None)
    engine = stat_logger.engine_index
    if settings is None or engine < 0:
        return None
    totals = Counters(settings.counters, engine, settings.num_speculative_tokens).totals()
    now = np.array([totals.mismatches, totals.overrides.sum(), *totals.unhealthy])
    new = now - getattr(stat_logger, "cospec_logged", np.zeros_like(now))
    stat_logger.cospec_logged = now
    if not new.any():
        return None
    mismatches, overrides, *unhealthy = new.tolist()
    line = f"CoSpec metrics: Policy: {settings.policy.policy}, Mismatches: {mismatches}, Overrides: {overrides}"
    if mismatches:
        line += f", Override rate: {100 * overrides / mismatches:.1f}%"
    reasons = ", ".join(f"{reason} {count}" for reason, count in zip(REASONS, unhealthy, strict=True) if count)
    if reasons:
        line += f", Strict for want of a whole draft: {sum(unhealthy)} positions ({reasons})"
    return line
