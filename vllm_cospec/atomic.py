"""Replacing a file or a directory so that a reader finds the old one or the new one at every moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def write_text(path: Path, text: str) -> None:
    """Write a file, and the directories above it where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


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
        if not destination.exists():
            partial.rename(destination)
        elif not _exchange(partial, destination):
            old = scratch / "old"
            destination.rename(old)
            try:
                partial.rename(destination)
            except OSError:
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
