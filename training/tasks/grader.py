"""What runs in a grading process: it loads a task and its reward, and scores what arrives. See :mod:`grading`."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from vllm_cospec.errors import ConfigError
from vllm_cospec.parent import end_with


def main(connection: int, parent: int) -> None:
    """Grade what arrives; runs in a process of its own.

    Args:
        connection: file descriptor that pairs of problem and text arrive at, and scores leave by.
        parent: process without which this one is to end.
    """
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process in its time
    with Connection(connection) as link:
        task = link.recv()
        try:
            from vllm_cospec.training.tasks import load_task
            from vllm_cospec.training.tasks.rewards import load_reward

            reward = load_reward(task.reward, load_task(task.name, **task.options))
            limit = int(task.reward_memory_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        except Exception as error:
            link.send(str(error) if isinstance(error, ConfigError) else f"task: {type(error).__name__}: {error}")
            return
        link.send(None)
        for problem, text in _incoming(link):
            try:
                value = reward(problem, text)
                score = float(value)
                link.send(score if math.isfinite(score) else f"returned {value!r}, which is no finite number")
            except Exception as error:  # a user's function may raise anything
                link.send(f"raised {type(error).__name__}: {error}")


def _incoming(link: Connection) -> Iterator[Any]:
    with contextlib.suppress(EOFError):
        while True:
            yield link.recv()
