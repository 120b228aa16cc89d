"""The modes of an evaluation at a temperature, and the baseline they are compared with."""

from __future__ import annotations

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.measure.modes import at_temperature, parse_mode, split_modes

MODES = [parse_mode(text, artefact=True) for text in ("target", "strict", "learned(threshold=0.3)")]


def test_greedy_modes_stay_as_they_are() -> None:
    assert at_temperature(MODES, 0.0, "greedy") == MODES


def test_a_sampled_baseline_is_the_target_at_the_same_temperature_and_is_asked_once() -> None:
    found = at_temperature(MODES, 0.7, "sampled")
    assert [mode.name for mode in found] == ["target, sampled", "strict", "learned(threshold=0.3)"]
    assert {mode.temperature for mode in found} == {0.7}
    assert found[0].kind == "target"
    assert found[2].extra == {"cospec_threshold": 0.3}


def test_a_greedy_baseline_stands_beside_the_sampled_target() -> None:
    found = at_temperature(MODES, 0.7, "greedy")
    assert [(mode.name, mode.temperature) for mode in found] == [
        ("target, greedy", 0.0), ("target", 0.7), ("strict", 0.7), ("learned(threshold=0.3)", 0.7),
    ]  # fmt: skip


@pytest.mark.parametrize(("temperature", "baseline"), [(0.0, "sampled"), (0.7, "none")])
def test_a_baseline_that_cannot_be_had_is_refused(temperature: float, baseline: str) -> None:
    with pytest.raises(ConfigError, match=f"--baseline: '{baseline}'"):
        at_temperature(MODES, temperature, baseline)


def test_one_grammar_reads_every_mode() -> None:
    assert [parse_mode(text).kind for text in ("target", "draft", "standard", " strict ")] == [
        "target", "draft", "standard", "strict",
    ]  # fmt: skip
    mode = parse_mode("typical(posterior_threshold=0.09, posterior_alpha=0.3, max_overrides=4)")
    assert (mode.policy.posterior_threshold, mode.policy.posterior_alpha) == (0.09, 0.3)
    assert mode.extra == {"cospec_max_overrides": 4}
    learned = parse_mode("learned(threshold=1, exact_tokens=8)")
    assert learned.policy is None
    assert learned.extra == {"cospec_threshold": 1.0, "cospec_exact_tokens": 8}


def test_a_list_is_split_outside_of_parentheses_and_names_each_mode_once() -> None:
    text = "target, cascade(alpha=0.9),typical(posterior_threshold=0.1, posterior_alpha=0.2);strict,target,"
    assert split_modes(text) == [
        "target", "cascade(alpha=0.9)", "typical(posterior_threshold=0.1, posterior_alpha=0.2)", "strict",
    ]  # fmt: skip
    assert split_modes(" ; ") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"policy": "cascade"}', r"--modes: unknown mode '\{\"policy\": .*known are target, draft, standard, strict"),
        ("target(threshold=0.5)", "target has no parameters; leave out threshold"),
        ("cascade(alpha=0.5, threshold=0.5)", "threshold is for learned"),
        ("learned(max_overrides=-1)", "cospec_max_overrides"),
        ("learned(max_overrides=few)", "cospec_max_overrides"),
        ("cascade(=0.5)", "is not of the form"),
    ],
)
def test_what_is_no_mode_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mode(text, where="--modes")
