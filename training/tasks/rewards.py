"""Rewards: functions (problem, text) -> score, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from vllm_cospec.errors import ConfigError
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
