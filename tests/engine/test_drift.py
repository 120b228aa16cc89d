"""Drift on a real engine: the bundled arbiter on the problems it was calibrated on, and on others."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_cospec.training.tasks import load_task
from vllm_cospec.training.tasks.demo import draw_expression

RunEngine = Callable[..., dict[str, Any]]
GREEDY = {"temperature": 0, "max_tokens": 80}


@pytest.mark.engine
def test_other_traffic_makes_verification_strict_and_the_calibrated_does_not(pair: Path, run_engine: RunEngine) -> None:
    usual = [problem.prompt for problem in load_task("demo").problems(77, 400, "test")]
    rng = random.Random(5)
    others = [draw_expression(rng, num_terms=4, product_share=0.25).prompt for _ in range(150)]
    runs = [
        {"name": "usual", "prompts": usual, "params": GREEDY},
        {"name": "others", "prompts": others[:110], "params": GREEDY},
        {"name": "after", "prompts": others[110:], "params": GREEDY},
        {"name": "strict", "prompts": others[110:], "params": GREEDY | {"extra_args": {"cospec_policy": "strict"}}},
        {"name": "strict usual", "prompts": usual[:60], "params": GREEDY | {"extra_args": {"cospec_policy": "strict"}}},
    ]
    config = {
        "method": "cospec",
        "model": str(pair / "draft"),
        "arbiter": str(pair / "arbiter"),
        "num_speculative_tokens": 7,
        "on_drift": "strict",
    }
    done = run_engine(runs, config)
    result, metrics = done["runs"], done["metrics"]

    def tokens(name: str) -> list[list[int]]:
        return [completions[0]["token_ids"] for completions in result[name]]

    assert sum(one != two for one, two in zip(tokens("usual"), tokens("strict usual"), strict=False)) > 15
    assert tokens("after") == tokens("strict")
    assert metrics["vllm:cospec_num_drift_alarms"] == 1
