"""Rewards: functions (problem, text) -> score, by name, and the guard that names the one that throws or hangs."""

from __future__ import annotations

import importlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_cospec.errors import ConfigError, RewardError, shorten
from vllm_cospec.training.tasks import answers
from vllm_cospec.training.tasks.protocol import Problem, Task

Reward = Callable[[Problem, str], float]

_REWARDS: dict[str, Reward] = {}


def reward(name: str) -> Callable[[Reward], Reward]:
    """Register a reward under ``name``."""

    def register(function: Reward) -> Reward:
        _REWARDS[name] = function
        return function

    return register


@reward("exact")
def exact(problem: Problem, text: str) -> float:
    """1.0 when the response, without surrounding white space, is the answer."""
    return float(text.strip() == problem.answer.strip())


@reward("math_verify")
def math_verify(problem: Problem, text: str) -> float:
    """1.0 when the response gives the problem's answer, as mathematics or in the same words."""
    return answers.score(problem.answer, text)


def load_reward(name: str, task: Task) -> Reward:
    """Return the reward called ``name``: ``task``, a registered one, or ``module:function``.

    Raises:
        ConfigError: unknown, or cannot be imported.
    """
    if name == "task":
        return task.score
    if name in _REWARDS:
        return _REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(["task", *sorted(_REWARDS)])
        raise ConfigError(f"task.reward: unknown reward {name!r}; known are {known}, or write module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs a user's code, which may raise anything
        raise ConfigError(f"task.reward: {name!r} cannot be imported ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise ConfigError(f"task.reward: {name!r} is not a function")
    return found


def guarded(function: Reward, problem: Problem, text: str, timeout_s: float) -> float:
    """Call a reward and check what it returns.

    Args:
        function: the reward.
        problem, text: its arguments.
        timeout_s: seconds it may take. Enforced in the main thread, where a signal can interrupt Python code.

    Raises:
        RewardError: names the problem and what went wrong.
    """
    where = f"reward of {shorten(problem.prompt)}"
    try:
        with _alarm(timeout_s):
            value: Any = function(problem, text)
            score = float(value)
    except _TooLong:
        raise RewardError(
            f"{where}: took longer than {timeout_s:g} s; mend it or raise task.reward_timeout_s"
        ) from None
    except Exception as error:  # a user's function may raise anything
        raise RewardError(f"{where}: raised {type(error).__name__}: {error}") from error
    if not math.isfinite(score):
        raise RewardError(f"{where}: returned {value!r}, which is no finite number")
    return score


class _TooLong(BaseException):
    """Not an Exception, so that a reward's own ``except Exception`` cannot swallow it."""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
