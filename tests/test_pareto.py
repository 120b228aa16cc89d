"""The comparison with the rules: its grids are settings that exist, and what counts as beaten."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_cospec.policies import policy_names
from vllm_cospec.training.evaluate import parse_mode


@pytest.fixture
def pareto(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("pareto")


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
