"""The modes of an evaluation at a temperature, and the baseline they are compared with."""

from __future__ import annotations

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.measure.evaluate import parse_mode, sampled_modes

MODES = [parse_mode(text, artefact=True) for text in ("target", "strict", "learned(threshold=0.3)")]


def test_greedy_modes_stay_as_they_are() -> None:
    assert sampled_modes(MODES, 0.0, "greedy") == MODES


def test_a_sampled_baseline_is_the_target_at_the_same_temperature_and_is_asked_once() -> None:
    found = sampled_modes(MODES, 0.7, "sampled")
    assert [mode.name for mode in found] == ["target, sampled", "strict", "learned(threshold=0.3)"]
    assert {mode.temperature for mode in found} == {0.7}
    assert found[0].engine == "target"
    assert found[2].extra == {"cospec_threshold": 0.3}


def test_a_greedy_baseline_stands_beside_the_sampled_target() -> None:
    found = sampled_modes(MODES, 0.7, "greedy")
    assert [(mode.name, mode.temperature) for mode in found] == [
        ("target, greedy", 0.0), ("target", 0.7), ("strict", 0.7), ("learned(threshold=0.3)", 0.7),
    ]  # fmt: skip


@pytest.mark.parametrize(("temperature", "baseline"), [(0.0, "sampled"), (0.7, "none")])
def test_a_baseline_that_cannot_be_had_is_refused(temperature: float, baseline: str) -> None:
    with pytest.raises(ConfigError, match=f"--baseline: '{baseline}'"):
        sampled_modes(MODES, temperature, baseline)
