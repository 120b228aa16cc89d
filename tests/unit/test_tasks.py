"""The bundled task: answers a calculator agrees with, and splits that cannot overlap."""

from __future__ import annotations

import pytest

from vllm_cospec.training.tasks import Problem, load_task, split_of
from vllm_cospec.training.tasks.demo import DemoTask


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'nope'.*demo"):
        load_task("nope")


def test_every_answer_is_the_value_of_the_expression() -> None:
    for problem in load_task("demo").problems(seed=1, n=500):
        assert problem.prompt.endswith("?")
        assert eval(problem.prompt[:-1], {"__builtins__": {}}) == int(problem.answer)


def test_every_written_step_is_right() -> None:
    stream = DemoTask().expressions(seed=2, split="test")
    for _, expression in zip(range(300), stream, strict=False):
        steps, _, value = expression.solution.partition("#")
        for step in steps.split(";"):
            left, right = step.split("=")
            assert eval(left, {"__builtins__": {}}) == int(right)
        assert eval(expression.prompt[:-1], {"__builtins__": {}}) == int(value)


def test_problems_mix_products_with_sums_and_differences() -> None:
    for problem in load_task("demo").problems(seed=3, n=200):
        assert "*" in problem.prompt
        assert "+" in problem.prompt or "-" in problem.prompt


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    task = load_task("demo")
    assert task.problems(seed=4, n=50) == task.problems(seed=4, n=80)[:50]
    assert {p.prompt for p in task.problems(seed=4, n=50)} != {p.prompt for p in task.problems(seed=5, n=50)}


def test_splits_do_not_overlap() -> None:
    task = load_task("demo")
    for split in ("train", "calibration", "test", "pretrain"):
        assert {split_of(p.prompt) for p in task.problems(seed=6, n=200, split=split)} == {split}


def test_models_are_trained_on_their_own_split_only() -> None:
    from vllm_cospec.training.pairs.demo import PLANS, draw_examples

    for recipe in PLANS.values():
        for phase in recipe.phases:
            assert {split_of(prompt) for prompt, _ in draw_examples(phase, 1, 300)} == {"pretrain"}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("2*3=6;6+1=7#7", 1.0),
        ("#7", 1.0),
        ("#7\n", 1.0),
        ("#8", 0.0),
        ("7", 0.0),
        ("#7;#8", 0.0),
        ("#77", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_value_counts(text: str, score: float) -> None:
    assert load_task("demo").score(Problem("2*3+1?", "7"), text) == score
