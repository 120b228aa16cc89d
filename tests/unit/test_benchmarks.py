"""What the benchmarks compute without an engine: shares of problems, tallies of rounds, grids of rules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_cospec.kernels.policies import policy_names
from vllm_cospec.training.measure.evaluate import parse_mode
from vllm_cospec.training.tasks import Problem


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script, which finds the modules beside it as when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def pareto(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("pareto")


def row(accuracy: float, acceptance_length: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "acceptance_length": acceptance_length}


@pytest.mark.parametrize("k", [1, 2, 7])
def test_every_rule_has_settings_and_each_is_one(pareto: ModuleType, k: int) -> None:
    grid = pareto.grid(k)
    assert {family for family, settings in grid.items() if settings or k == 1} == set(policy_names()) - {
        "strict", "learned", "random",
    }  # fmt: skip
    for family, settings in grid.items():
        for setting in settings:
            assert parse_mode(setting, artefact=True).policy.policy == family


def test_a_setting_is_beaten_by_more_accuracy_at_no_shorter_an_acceptance_length(pareto: ModuleType) -> None:
    rows = {
        "target": row(0.9, 9.0),
        "learned": row(0.7, 5.0),
        "learned(threshold=0.2)": row(0.6, 6.0),
        "shorter and worse": row(0.5, 4.0),
        "as long and worse": row(0.5, 6.0),
        "longer": row(0.5, 6.1),
        "as accurate": row(0.7, 3.0),
    }
    assert pareto.beaten_by(rows) == {
        "shorter and worse": "learned",
        "as long and worse": "learned(threshold=0.2)",
        "longer": None,
        "as accurate": None,
    }


def test_the_shares_of_the_rounds_are_all_problems_once(script: Callable[[str], ModuleType]) -> None:
    throughput, problems = script("throughput"), [Problem(str(i), "") for i in range(7)]
    shares = [throughput.share(problems, number, 3) for number in range(3)]
    assert [sorted(own) for own in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    assert all(problems[index] is problem for own in shares for index, problem in own.items())
    assert [throughput.share(problems, number, 1) for number in range(3)] == [dict(enumerate(problems))] * 3


def test_rounds_that_share_the_problems_and_rounds_that_repeat_them_add_up(script: Callable[[str], ModuleType]) -> None:
    results, load = script("results"), script("load")
    reply = load.Reply("text", 10, False, [0.1, 0.2])
    target, other = results.Tally(), results.Tally()
    target.add([reply], {0: 0.0}, 2.0, {})
    target.add([reply], {1: 1.0}, 1.0, {})
    other.add([reply] * 2, {0: 1.0, 1: 1.0}, 2.0, {})
    other.add([reply] * 2, {0: 0.0, 1: 0.0}, 1.0, {})  # a problem counts as it was answered first
    first, second = results.rows({"target": target, "learned": other})
    assert (first["num_problems"], first["accuracy"], first["rounds_tokens_per_s"]) == (2, 0.5, [5.0, 10.0])
    assert (second["num_problems"], second["accuracy"], second["rounds_tokens_per_s"]) == (2, 1.0, [10.0, 20.0])
    assert second["paired_vs_target"] == {"gained": 1, "lost": 0, "p_value": 1.0}
    assert results.ratios({"target": target, "learned": other}) == [
        "learned / target: 2.00 (2.00 to 2.00 in 2 rounds) tokens per second"
    ]
