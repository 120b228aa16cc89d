"""Rewards by name. What happens to those that throw or hang: test_grading.py."""

from __future__ import annotations

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks import Problem, load_task
from vllm_cospec.training.tasks.rewards import load_reward

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
    assert load_reward("math_verify", load_task("demo"))(PROBLEM, text) == score


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
