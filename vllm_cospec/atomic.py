"""Replacing a file or a directory so that a reader finds the old one or the new one at every moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def write_text(path: Path, text: str) -> None:
    """Write a file, and the directories above it where they are missing."""
    with new_file(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """Yield a path beside ``destination`` for a file that takes its name when the block ends without an exception.

    It is on the disk by then. When the block raises, what stood there before stays and nothing is left behind.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(destination.name + ".partial")
    try:
        yield partial
        _share([partial])
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``destination`` that takes its name when the block ends without an exception.

    What stood there before is removed afterwards; when the block raises, it stays and nothing is left behind.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        partial = scratch / "new"
        partial.mkdir()
        yield partial
        _share(path for path in partial.rglob("*") if path.is_file())
        if not destination.exists():
            partial.rename(destination)
        elif not _exchange(partial, destination):
            old = scratch / "old"
            try:
                destination.rename(old)
                partial.rename(destination)
            except BaseException:  # an interrupt as well
                if old.exists() and not destination.exists():
                    old.rename(destination)
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _share(files: Iterable[Path]) -> None:
    """Let others read files as the umask says: safetensors writes them for their owner alone."""
    umask = _umask()
    for path in files:
        path.chmod((0o666 | path.stat().st_mode & 0o111) & ~umask)


def _umask() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:"))
    except (OSError, StopIteration):  # elsewhere it can only be read by setting it, which other threads may notice
        umask = os.umask(0o022)
        os.umask(umask)
        return umask
