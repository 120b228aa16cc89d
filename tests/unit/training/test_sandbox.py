"""What a program in the sandbox can do, and what it cannot: each limit, tried out."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from vllm_cospec.training.tasks import sandbox
from vllm_cospec.training.tasks.sandbox import Ending, Limits, require, run

QUICK = Limits(seconds=10.0, memory_gb=0.5, file_mb=1.0)


def test_a_program_that_comes_to_its_end_has_passed() -> None:
    require(confined=True)
    assert run("assert sum(range(4)) == 6", QUICK) == Ending(True)
    everyday = """
import collections, datetime, heapq, itertools, json, math, random, re, string, typing, threading, asyncio
found = []
thread = threading.Thread(target=lambda: found.append(1))
thread.start()
thread.join()
assert found == [1]
async def later():
    await asyncio.sleep(0.01)
    return 2
assert asyncio.run(later()) == 2
with open("own.txt", "w") as file:
    file.write("mine")
assert open("own.txt").read() == "mine"
print("to nobody")
"""
    assert run(everyday, QUICK) == Ending(True)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'not equal'", "raised AssertionError: not equal"),
        ("def f(:", "raised SyntaxError"),
        ("import sys; sys.exit(0)", "raised SystemExit"),
        ("import os; os._exit(0)", "left before its end"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("x = bytearray(2**30)", "raised MemoryError"),
        ("open('big', 'wb').write(b'x' * 2**21)", "raised OSError"),
        ("import ctypes; ctypes.string_at(0)", "ended by signal SIGSEGV"),
        ("f = lambda: f()\nf()", "raised RecursionError"),
    ],
)
def test_every_other_end_is_named(program: str, reason: str) -> None:
    outcome = run(program, QUICK)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(100)"])
def test_time_is_limited_by_the_clock(program: str) -> None:
    began = time.monotonic()
    assert run(program, Limits(seconds=1.0)) == Ending(False, "took longer than 1 s")
    assert time.monotonic() - began < 30


def test_nothing_outside_of_its_directory_is_read_or_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("gold")
    for program in (
        f"open({str(secret)!r}).read()",
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.unlink({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'mine')",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
    ):
        assert run(program, QUICK).reason.startswith("raised PermissionError"), program
    assert secret.read_text() == "gold"
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]


def test_no_network_no_other_program_no_other_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reached = threading.Event()

        def accept() -> None:
            server.settimeout(5)
            try:
                server.accept()[0].close()
                reached.set()
            except OSError:
                pass

        waiting = threading.Thread(target=accept)
        waiting.start()
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
        assert run(connect, QUICK).reason.startswith("raised PermissionError")
        waiting.join()
        assert not reached.is_set()
    for program in (
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        f"import os; os.kill({os.getpid()}, 0)",
        "import os; os.kill(os.getppid(), 9)",
    ):
        assert run(program, QUICK).reason.startswith("raised PermissionError"), program


def test_limits_alone_run_where_a_kernel_cannot_confine() -> None:
    assert run("open('/etc/passwd').read()", Limits(confined=False)).passed
    assert not run("x = bytearray(2**32)", Limits(confined=False)).passed


def test_a_child_that_escapes_limits_alone_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "START_S", 4.0)
    began = time.monotonic()
    run("import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(30)\n", Limits(1.0, confined=False))
    assert time.monotonic() - began < 20
