"""Ends a process with the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def end_with(parent: int) -> None:
    """Have Linux end this process when the thread that started it ends, also in the middle of a calculation.

    Args:
        parent: process that started this one; if it has ended already, this one ends at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
