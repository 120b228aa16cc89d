"""What calibration says in the end, what it is asked for, and what it counts of a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.commands import DEMO_CONFIG, as_served
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.measure.calibrate import _conditions, _requests, conclusion
from vllm_cospec.training.measure.thresholds import Sweep


def row(threshold: float, accuracy: float, bound: float, **more: Any) -> dict[str, Any]:
    return {"threshold": threshold, "accuracy": accuracy, "loss_bound": bound, "num_problems": 500, **more}


def test_the_conclusion_names_the_threshold_and_its_bound() -> None:
    rows = [row(1.0, 0.5, 0.0), row(0.5, 0.52, 0.004, chosen=True), row(0.1, 0.4, 0.15)]
    found = conclusion(rows, 0.01, 0.95)
    assert found.startswith("threshold 0.5: with 95% confidence it loses less than 0.0040 of accuracy (+0.0200 ")
    assert "500 problems" in found


def test_where_nothing_passes_the_conclusion_says_strict_and_the_way_out() -> None:
    rows = [row(1.0, 0.5, 0.0, chosen=True), row(0.9, 0.5, 0.017), row(0.5, 0.6, 0.017)]
    found = conclusion(rows, 0.01, 0.9)
    assert found.startswith("strict: no threshold keeps the loss below 0.01 with 90% confidence on 500 problems")
    assert "smallest bound is 0.0170" in found
    assert "max_accuracy_loss" in found


def test_where_what_passes_is_no_better_the_conclusion_says_so() -> None:
    rows = [row(1.0, 0.5, 0.0, chosen=True), row(0.9, 0.48, 0.008)]
    assert "does better than strict" in conclusion(rows, 0.01, 0.95)


def test_what_is_served_can_differ_from_what_was_trained_for() -> None:
    config = load_train_config(DEMO_CONFIG)
    assert as_served(config, {"draft": None}, {"problems": None}) == config
    other = as_served(
        config, {"num_speculative_tokens": 3, "dtype": "bfloat16", "draft": None}, {"temperature": 0.7, "level": 0.9}
    )
    assert (other.pair.num_speculative_tokens, other.pair.engine["dtype"]) == (3, "bfloat16")
    assert (other.calibration.temperature, other.calibration.level) == (0.7, 0.9)
    assert (other.pair.draft, other.pair.engine["max_model_len"]) == (config.pair.draft, 128)
    assert config.pair.engine["dtype"] == "float32"


def test_an_artefact_says_how_its_answers_were_sampled() -> None:
    """As in training, unless calibration names another temperature."""
    demo = load_train_config(DEMO_CONFIG)
    rollout = demo.rollout.model_copy(update={"temperature": 0.7, "top_p": 0.9})
    sampled = demo.model_copy(update={"rollout": rollout})
    for config, temperature, top_p in (
        (demo, 0.0, 1.0), (sampled, 0.7, 0.9), (as_served(sampled, {}, {"temperature": 0.2}), 0.2, 0.9),
    ):  # fmt: skip
        found = _conditions(config, "float32")
        assert (found.temperature, found.top_p) == ((temperature, temperature), (top_p, top_p))


@pytest.mark.parametrize(
    ("pair", "calibration", "named"),
    [
        ({"num_speculative_tokens": 0}, {}, "num_speculative_tokens"),
        ({}, {"level": 1.0}, "level"),
        ({}, {"max_accuracy_loss": -0.1}, "max_accuracy_loss"),
        ({}, {"temperature": 3.0}, "temperature"),
        ({}, {"problems": 3}, "problems"),
    ],
)
def test_what_cannot_be_served_is_refused(pair: dict[str, Any], calibration: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        as_served(load_train_config(DEMO_CONFIG), pair, calibration)


def test_thresholds_outside_of_0_to_1_are_refused(tmp_path: Path) -> None:
    text = DEMO_CONFIG.read_text() + "\nthresholds = [0.5, 1.5]\n"
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ConfigError, match="thresholds lie from 0 to 1"):
        load_train_config(tmp_path / "bad.toml")


def test_a_request_counts_as_many_overrides_as_scores_exceed_the_threshold() -> None:
    decisions = [np.array([0.1, 0.9, 0.5], np.float32), np.zeros(0, np.float32)]
    found = Sweep(
        (1.0, 0.5), np.array([[0, 1], [0, 1]]), np.zeros(2), np.array([9, 4]), np.array([3, 2]), np.zeros(2, bool),
        decisions,
    )  # fmt: skip
    first, second = _requests(found, 1)
    assert (first.tokens, first.mismatches, first.overrides, first.histogram.sum()) == (9, 3, 1, 3)
    assert (second.tokens, second.mismatches, second.overrides, second.histogram.sum()) == (4, 0, 0, 0)
