"""Starts a real ``vllm serve`` as a child process and makes sure that it ends. For the demo, benchmarks and tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_cospec import compat
from vllm_cospec.config import asked_for
from vllm_cospec.errors import ServerError

HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 10.0
# Waits at a pipe whose other end the starter of a server holds. When that closes without a word, the starter is gone
# and could not clean up: then the server's process group ends, engine cores in mid-start included, which are deaf to
# SIGTERM and would go on for minutes. Imports nothing of ours, so that it is there at once.
WATCHDOG = """
import os, signal, sys, time
group = int(sys.argv[1])
if not sys.stdin.buffer.read(1):
    try:
        os.killpg(group, signal.SIGTERM)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def free_port() -> int:
    """Return a TCP port nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A running ``vllm serve``. Use as a context manager."""

    def __init__(
        self,
        model: Path | str,
        speculative_config: dict[str, Any] | None,
        arguments: tuple[str, ...] = (),
        port: int = 0,
        log: Path | None = None,
    ):
        """Describe a server; nothing is started yet.

        Args:
            model: directory or hub id of the target.
            speculative_config: as for ``--speculative-config``; None for no speculation.
            arguments: further arguments of ``vllm serve``.
            port: 0 picks a free one.
            log: file that receives the server's output; None lets it through to the terminal.
        """
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        self.command = [*_serve_command(), str(model), "--host", HOST, "--port", str(self.port), *arguments]
        self._asks_for_us = asked_for(speculative_config)
        if speculative_config is not None:
            self.command += ["--speculative-config", json.dumps(speculative_config)]
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        """Start the server and its watchdog.

        Raises:
            CompatibilityError: cospec is asked for, and vLLM would not load the plugin.
            ServerError: the port is taken.
        """
        if self._asks_for_us:
            compat.require_plugin()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM's own socket
            try:
                probe.bind((HOST, self.port))
            except OSError as error:
                raise ServerError(f"port {self.port}: {error.strerror}; choose another one") from None
        try:
            with ThreadPoolExecutor(1) as starter:  # where no signal comes between a process and our knowing of it
                starter.submit(self._start).result()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, tick: Callable[[], None] = lambda: None, timeout: float = START_TIMEOUT_S) -> None:
        """Return when the server answers.

        Args:
            tick: called every quarter of a second, to show progress.
            timeout: seconds.

        Raises:
            ServerError: it died or took too long; carries the last line of its log.
        """
        assert self._process is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with exit code {self._process.returncode}: {self.last_line()}")
            with (
                contextlib.suppress(OSError, urllib.error.URLError),
                urllib.request.urlopen(f"{self.url}/health", timeout=2) as response,
            ):
                if response.status == 200:
                    return
            tick()
            time.sleep(0.25)
        raise ServerError(f"the server did not answer within {timeout:.0f} s: {self.last_line()}")

    def wait(self) -> int:
        """Block until the server ends; returns its exit code."""
        assert self._process is not None
        return self._process.wait()

    def alive(self) -> bool:
        """Return whether the process is still there."""
        return self._process is not None and self._process.poll() is None

    def counters(self) -> dict[str, float]:
        """Return the counters of ``/metrics``, by name, summed over labels; those with a position as ``name[i]``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            if family.type == "counter":
                for sample in family.samples:
                    if sample.name.endswith("_total"):
                        position = sample.labels.get("position")
                        name = family.name + ("" if position is None else f"[{position}]")
                        found[name] = found.get(name, 0.0) + sample.value
        return found

    def last_line(self) -> str:
        """Return the last line of the log that is not empty."""
        if self.log is None or not self.log.exists():
            return "see its output above"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it printed nothing"

    def stop(self) -> None:
        """End the server and everything it started. Does nothing when it is not running."""
        process = self._process
        if process is None:
            return
        try:
            for sent in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
                    break
        finally:  # children that outlived the parent; everything when the user is too impatient to wait
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if self._watchdog is not None:
            self._watchdog.communicate(b".")  # there is nothing left to watch
        self._process = self._watchdog = None

    def _start(self) -> None:
        environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
        output = None if self.log is None else self.log.open("wb")
        try:
            self._process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the whole group in order
            )
            self._watchdog = subprocess.Popen(
                [sys.executable, "-ISc", WATCHDOG, str(self._process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()


def _serve_command() -> list[str]:
    """``vllm serve``, or what it runs where vLLM's CPU build is installed without a distribution named vllm."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP unwind the stack, so that servers are stopped.

    SIGINT is named because a shell starts background jobs with it ignored, and Python then leaves it so. Off the main
    thread, in a notebook's executor for instance, no handler can be set, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = {sent: signal.signal(sent, interrupt) for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for sent, handler in previous.items():
            signal.signal(sent, handler)


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C take effect after the block only. Does nothing outside of the main thread, where no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda signum, frame: pressed.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt
