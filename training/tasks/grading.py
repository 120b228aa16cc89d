"""Grading in processes of its own: a grader that throws, hangs or dies costs its answer, not the run.

Each process has its own interpreter, which loads the task and the reward by name. Answers are graded while the engine
goes on generating. A time limit ends the process, whatever it is busy with, and another takes its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from typing import Any

from scipy.stats import binomtest

from vllm_cospec.errors import ConfigError, RewardError, shorten
from vllm_cospec.training.config import TaskConfig
from vllm_cospec.training.tasks.protocol import Problem

GRADER = "vllm_cospec.training.tasks.grader"
START_TIMEOUT_S = 300.0
BEYOND_DOUBT = 1e-3  # chance of so many failures where the share that is allowed is the true one
SHOWN = 200  # characters of an answer in a message


@dataclass(frozen=True)
class Grade:
    """The score of one answer."""

    score: float
    failure: str = ""  # a sentence with problem, reason and answer, where the grader failed; the score is 0 then


class Graders:
    """A pool of grading processes. Use as a context manager."""

    def __init__(self, task: TaskConfig):
        """Start the processes.

        Args:
            task: which task and reward, how many processes, their limits.
        """
        self._task = task
        self._local = threading.local()
        self._all: list[_Process] = []
        self._closed = False
        self._threads = ThreadPoolExecutor(task.reward_processes, "grader")
        self._started = [self._threads.submit(self._process) for _ in range(task.reward_processes)]

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what is not graded yet is dropped."""
        self._closed = True  # read by a thread that has just started a process, which is not among them yet
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self._all):
            process.kill()
        self._threads.shutdown(wait=True)

    def wait_until_ready(self) -> None:
        """Return when every process has loaded the task.

        Raises:
            ConfigError: one cannot.
        """
        for started in self._started:
            started.result()

    def submit(self, problem: Problem, text: str) -> Future[Grade]:
        """Grade an answer; returns at once."""
        return self._threads.submit(self._grade, problem, text)

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        """Grade answers and wait for all of them."""
        return [future.result() for future in [self.submit(*pair) for pair in zip(problems, texts, strict=True)]]

    def _process(self) -> _Process:
        """The process of the calling thread; started where there is none, or where it has ended."""
        process: _Process | None = getattr(self._local, "process", None)
        if process is None or not process.alive():
            if process is not None:
                process.kill()
                self._all.remove(process)
            process = self._local.process = _Process(self._task)
            self._all.append(process)
            if self._closed:
                process.kill()
            try:
                process.wait_until_ready()
            except ConfigError:
                process.kill()  # else its late word would be taken for the score of an answer
                raise
        return process

    def _grade(self, problem: Problem, text: str) -> Grade:
        process = self._process()
        try:
            found = process.ask(problem, text, self._task.reward_timeout_s)
        except TimeoutError:
            found = f"took longer than {self._task.reward_timeout_s:g} s (task.reward_timeout_s)"
            process.kill()
        except EOFError:
            found = f"ended its process ({process.how_it_ended()})"
            process.kill()
        if isinstance(found, float):
            return Grade(found)
        where = f"{problem.source}: " if problem.source else ""
        shown = shorten(text, SHOWN)
        return Grade(0.0, f"{where}reward of {shorten(problem.prompt)} {found}; the answer was {shown}")


class _Process:
    """One interpreter that grades, and the connection to it."""

    def __init__(self, task: TaskConfig):
        self._connection, theirs = Pipe()
        self._scratch = tempfile.mkdtemp(prefix="cospec-grader-")  # outlives a kill in the middle of an answer
        command = [sys.executable, "-c", f"from {GRADER} import main; main({theirs.fileno()}, {os.getpid()})"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        environment["TMPDIR"] = self._scratch
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
        )
        theirs.close()
        with contextlib.suppress(OSError):  # it ended at once: found out when it is asked
            self._connection.send(task)

    def wait_until_ready(self) -> None:
        try:
            answer = self._receive(START_TIMEOUT_S)
        except (TimeoutError, EOFError):
            raise ConfigError(f"task: its grading process cannot be started ({self.how_it_ended()})") from None
        if answer is not None:
            raise ConfigError(answer)

    def ask(self, problem: Problem, text: str, timeout_s: float) -> Any:
        """Return the score, a float, or what went wrong.

        Raises:
            TimeoutError: it took longer.
            EOFError: the process has ended.
        """
        try:
            self._connection.send((problem, text))
        except OSError:
            raise EOFError from None
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Any:
        try:
            arrived = self._connection.poll(timeout_s)
            if arrived:
                return self._connection.recv()
        except OSError:
            raise EOFError from None
        raise TimeoutError

    def alive(self) -> bool:
        return self._process.poll() is None

    def how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1)
            return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "it gives no answer"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class FailureWatch:
    """Ends a run when more graders fail than is allowed, beyond doubt; one bad answer never does."""

    def __init__(self, allowed: float, graded: int = 0, failed: int = 0):
        """Args:
        allowed: share of the answers whose grader may fail.
        graded, failed: counts of an earlier part of the run.
        """
        self.allowed, self.graded, self.failed = allowed, graded, failed

    def add(self, graded: int, failures: Sequence[str]) -> None:
        """Count answers.

        Args:
            graded: how many.
            failures: a sentence about each that failed.

        Raises:
            RewardError: too many have failed; carries the last one.
        """
        self.graded += graded
        self.failed += len(failures)
        if not failures or self.failed <= self.allowed * self.graded:
            return
        if binomtest(self.failed, self.graded, self.allowed, "greater").pvalue < BEYOND_DOUBT:
            raise RewardError(
                f"task.max_failed_rewards: {self.failed} of {self.graded} answers could not be graded, more than "
                f"{self.allowed:g} of them; the last: {failures[-1]}"
            )
