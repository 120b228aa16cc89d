"""Runs code that a model wrote, in a process that can do little: compute, and write into a directory of its own.

The process is limited in time, memory and the size of its files. Landlock lets it read the Python installation and
nothing else, and write below its directory alone; a seccomp filter refuses sockets, other programs, further processes
and signals to others. Both last for the rest of the process and need no privileges.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_cospec.errors import ConfigError

CELL = Path(__file__).with_name("sandbox_cell.py")
SHOWN = 300  # characters of what a program says about its end
START_S = 20.0  # for the interpreter, on top of the program's own time


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0  # by the clock
    memory_gb: float = 1.0  # GiB of address space
    file_mb: float = 16.0  # MiB of each file it writes
    confined: bool = True  # False: limits alone, where the kernel knows neither Landlock nor seccomp


@dataclass(frozen=True)
class Ending:
    """How a program ended."""

    passed: bool  # it ran to its end
    reason: str = ""  # why it did not


def run(program: str, limits: Limits) -> Ending:
    """Run a Python program and say whether it came to its end without an exception.

    A program that leaves early, with whatever exit code, has not come to its end.

    Args:
        program: its source.
        limits: of its process.

    Raises:
        ConfigError: this machine cannot confine it.
    """
    word = secrets.token_hex(16)  # said at the end by the process, which has it from its standard input
    with tempfile.TemporaryDirectory(prefix="cospec-answer-", ignore_cleanup_errors=True) as directory:
        settings = [f"{limits.seconds:g}", f"{limits.memory_gb:g}", f"{limits.file_mb:g}", str(int(limits.confined))]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CELL), str(os.getpid()), *settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory,
            env={"PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(f"{word}\n{program}".encode(errors="replace"), limits.seconds + START_S)
        except subprocess.TimeoutExpired:
            return Ending(False, f"took longer than {limits.seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # where nothing confines it, a child may have left
                process.communicate(timeout=1)  # its session and hold the pipe open
    last = said.decode(errors="replace").rstrip().rpartition("\n")[2]
    if last == word:
        return Ending(True)
    if last.startswith("cannot confine: "):
        raise ConfigError(
            f"task.options.sandbox: this machine cannot confine a process ({last.partition(': ')[2]}); use a Linux "
            f'kernel with Landlock and seccomp, or set it to "limits"'
        )
    if process.returncode == -signal.SIGALRM:
        return Ending(False, f"took longer than {limits.seconds:g} s")
    if process.returncode < 0:
        return Ending(False, f"ended by signal {signal.Signals(-process.returncode).name}")
    return Ending(False, last[:SHOWN] if last.startswith("raised ") else "left before its end")


@cache
def require(confined: bool) -> None:
    """Check that programs can be run here at all.

    Raises:
        ConfigError: they cannot.
    """
    outcome = run("pass", Limits(seconds=60.0, confined=confined))
    if not outcome.passed:
        raise ConfigError(f"task.options.sandbox: a program that does nothing fails here ({outcome.reason})")
