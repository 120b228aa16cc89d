"""Finds the processes below another one, and those that go on when they should have ended."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil


def descendants(pid: int | None = None, naming: str = "") -> list[psutil.Process]:
    """The processes below one (this one), those with a text in their command line.

    One that ends while it is asked is left out.
    """
    below = psutil.Process(os.getpid() if pid is None else pid).children(recursive=True)
    return [process for process in below if naming in _command_line(process)] if naming else below


def survivors(processes: Sequence[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those that still run after so many seconds.

    Where nobody waits for orphans, as in a container without an init, the others stay as zombies.
    """
    _, alive = psutil.wait_procs(processes, timeout)
    return [process for process in alive if _status(process) not in ("", psutil.STATUS_ZOMBIE)]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return ""
