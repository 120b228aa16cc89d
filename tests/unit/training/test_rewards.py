"""Rewards, and what happens to those that throw, hang or return nonsense."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from vllm_cospec.errors import ConfigError, RewardError
from vllm_cospec.training.tasks import Problem, load_task
from vllm_cospec.training.tasks.rewards import guarded, load_reward

PROBLEM = Problem("1/2+1/4?", "3/4")


def test_exact_compares_without_surrounding_space() -> None:
    exact = load_reward("exact", load_task("demo"))
    assert exact(PROBLEM, " 3/4\n") == 1.0
    assert exact(PROBLEM, "0.75") == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [("so it is \\boxed{\\frac{3}{4}}", 1.0), ("The answer is 0.75.", 1.0), ("The answer is 0.76.", 0.0), ("", 0.0)],
)
def test_math_verify_recognises_equal_values(text: str, score: float) -> None:
    assert guarded(load_reward("math_verify", load_task("demo")), PROBLEM, text, 20) == score


def test_the_tasks_own_reward_is_the_default() -> None:
    assert load_reward("task", load_task("demo"))(Problem("2*3?", "6"), "2*3=6#6") == 1.0


def test_a_function_of_a_users_module_is_found() -> None:
    assert load_reward("operator:eq", load_task("demo"))(1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nearly", "unknown reward 'nearly'; known are task, exact, math_verify"),
        ("no_such_module:score", "'no_such_module:score' cannot be imported"),
        ("math:no_such_function", "cannot be imported"),
        ("math:pi", "is not a function"),
    ],
)
def test_what_is_no_reward_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(name, load_task("demo"))


def raises(problem: Problem, text: str) -> float:
    raise KeyError("gold")


def hangs(problem: Problem, text: str) -> float:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "raised KeyError: 'gold'"),
        (hangs, "took longer than 0.3 s"),
        (lambda p, t: math.nan, "returned nan, which is no finite number"),
        (lambda p, t: "good", "raised ValueError"),
        (lambda p, t: None, "raised TypeError"),
    ],
)
def test_a_bad_reward_is_named_with_its_problem(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        guarded(function, PROBLEM, "", 0.3)
    assert "1/2+1/4?" in str(caught.value)
