"""What ends a program that has started servers unwinds its stack, so that they end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from vllm_cospec.server import Server, interruptible


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_program_unwinds_its_stack(sent: signal.Signals) -> None:
    before = signal.getsignal(sent)
    unwound = []

    def end() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), sent)
                time.sleep(5)
            finally:
                unwound.append(sent)

    with pytest.raises(KeyboardInterrupt):
        end()
    assert unwound == [sent]
    assert signal.getsignal(sent) is before


@pytest.mark.parametrize("moment", [1, 2], ids=["its own", "its watchdog's"])
def test_an_interrupt_while_a_process_is_made_leaves_no_server(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the birth of a process and its name being written down: nobody else would know of it."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupted(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        if len(started) == moment:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # it is here, and whoever can be interrupted is
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    server = Server("model", None)
    server.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    try:
        with pytest.raises(KeyboardInterrupt), interruptible(), server:
            pass
        assert [process.wait(5) is not None for process in started] == [True, True]
        assert not server.alive()
    finally:
        for process in started:
            process.kill()


def test_who_interrupts_again_does_not_wait_for_a_deaf_server() -> None:
    server = Server("model", None)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    server.command = [sys.executable, "-c", deaf]
    with interruptible(), server:
        process = server._process
        assert process is not None
        time.sleep(1)  # it is deaf by now
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            server.stop()
        assert process.wait(5) == -signal.SIGKILL
        assert time.monotonic() - began < 5


def test_a_server_without_a_watchdog_is_not_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def only_once(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no process left")
        started.append(popen(*args, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", only_once)
    server = Server("model", None)
    server.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    try:
        with pytest.raises(OSError, match="no process left"), server:
            pass
        assert started[0].wait(5) is not None
    finally:
        started[0].kill()
