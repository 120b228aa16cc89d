"""The simulation of calibrations: its populations are what they say, its rules are those of the package."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripts import benchmark

from vllm_cospec.training.measure.intervals import paired_difference
from vllm_cospec.training.measure.noninferiority import p_value
from vllm_cospec.training.measure.thresholds import Sweep


@pytest.fixture
def scripts() -> tuple[ModuleType, ModuleType]:
    """The benchmark and its populations."""
    return benchmark("calibration"), benchmark("populations")


@pytest.mark.parametrize("credit", [1.0, 0.5])
def test_the_population_made_to_break_a_bound_loses_as_much_as_it_says(
    scripts: tuple[ModuleType, ModuleType], credit: float
) -> None:
    population = scripts[1].flat(10, 0.01, 0.05, credit)
    assert population.loss[0] == 0
    assert population.loss[1:] == pytest.approx(np.full(10, 0.01), abs=1e-8)
    different = (population.scores[:, 1:] != population.scores[:, :1]).T @ population.shares
    assert different == pytest.approx(np.full(10, 0.05))


def test_a_population_of_answers_is_the_same_when_it_is_read_again(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    response = rng.integers(0, 30, (4, 50))
    score, tokens = rng.integers(0, 2, 30).astype(float), rng.integers(5, 50, 30)
    found = Sweep((1.0, 0.5, 0.1, 0.0), response, score, tokens, tokens // 3 + 1, tokens > 40, [np.zeros(0)] * 30)
    population = scripts[1].of_sweep("some", found)
    assert population.problems.sum() == 50
    assert population.loss == pytest.approx(found.scores[0].mean() - found.scores.mean(axis=1))
    scripts[1].save(tmp_path / "some.json", population)
    again = scripts[1].load(tmp_path / "some.json")
    assert (again.scores == population.scores).all()
    assert (again.problems == population.problems).all()
    assert again.acceptance_length == pytest.approx(population.acceptance_length, abs=1e-4)
    parts = population.split(5, seed=0)
    assert [part.sum() for part in parts] == [10] * 5
    assert (sum(parts) == population.problems).all()


def test_lines_that_were_answered_at_several_thresholds_are_a_population(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    right = {
        "strict": [1, 0, 0, 1],
        "text: learned(threshold=0.3)": [1, 1, 0, 0],
        "text: learned(threshold=0.9)": [1, 1, 0, 1],
    }
    others = {"warm: learned(threshold=0.5)": [0, 0, 0, 0], "kl(max_kl=1.0)": [0, 0, 0, 0]}
    rows: list[dict[str, Any]] = [
        {
            "mode": mode, "problem": i, "right": bool(own), "new": i != 1, "similarity": 0.5, "tokens": 7,
            "capped": False, "steps": 4 if mode == "strict" else 3, "mismatches": 0, "overrides_at": [],
        }
        for mode, answers in (right | others).items() for i, own in enumerate(answers)
    ]  # fmt: skip
    (tmp_path / "about.json").write_text('{"num_problems": 4}')
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for unread, loss in ((False, [0, -0.25, 0]), (True, [0, 0, 1 / 3])):
        scripts[0].lines(tmp_path, tmp_path / "code.json", "text", unread)
        population = scripts[1].load(tmp_path / "code.json")
        assert population.thresholds == (1.0, 0.9, 0.3)
        assert population.loss == pytest.approx(loss)
        assert population.problems.sum() == 4 - unread
        assert population.acceptance_length == pytest.approx([2, 3, 3])  # the first token is the prompt's own


def test_the_rules_say_what_the_tests_of_the_package_say(scripts: tuple[ModuleType, ModuleType]) -> None:
    calibration, populations = scripts
    population = populations.flat(5, 0.005, 0.06)
    sets = population.draw(6, 200, seed=3)
    exact = calibration.exact(population, sets, 200, 0.02)
    pointwise = calibration.pointwise(population, sets, 200, 0.02)
    assert exact[:, 0].all()
    assert 0 < exact[:, 1:].mean() < 1
    for s, counts in enumerate(sets):
        scores = np.repeat(population.scores, counts, axis=0)
        for t in range(1, 6):
            assert exact[s, t] == (p_value(scores[:, t], scores[:, 0], 0.02) <= 0.05)
            _, (low, _) = paired_difference(scores[:, t], scores[:, 0])
            assert pointwise[s, t] == (-low < 0.02)
    ordered = calibration.sequence(np.array([[True, True, False, True]]))
    assert ordered.tolist() == [[True, True, False, False]]


def test_the_hardest_margins_are_broken_by_what_they_were_made_from(scripts: tuple[ModuleType, ModuleType]) -> None:
    calibration, populations = scripts
    population = populations.flat(3, 0.0101, 0.05)
    hard = [margin for margin in calibration.margins(population, [0.02]) if margin != 0.02]
    assert len(hard) == 1
    assert calibration.outcome(population, np.array([0, 1, 2, 3]), hard[0])["broken"] == 0.75
    assert calibration.outcome(population, np.array([0, 1]), 0.02)["broken"] == 0
