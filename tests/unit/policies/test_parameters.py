"""What holds for all policies, and which parameters they refuse."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from policy_cases import INF, TYPE_ADAPTER, mismatch_rows, mismatches, quick
from policy_examples import EXAMPLES, RULES
from pydantic import ValidationError

from vllm_cospec.kernels import policies
from vllm_cospec.kernels.policies import (
    Learned,
    Rule,
    Typical,
)
from vllm_cospec.kernels.statistics import INDEX

# What holds for all of them


@settings(quick, max_examples=15)
@given(mismatch_rows())
def test_rules_look_only_at_the_statistics_they_say_they_read(rows: Any) -> None:
    for rule in RULES:
        complete, partial = mismatches(rows), mismatches(rows)
        for name in set(INDEX) - type(rule).reads:
            partial.statistics[:, INDEX[name]] = math.nan
        assert rule.keep(partial).tolist() == rule.keep(complete).tolist(), rule.policy


def test_two_policies_cannot_share_a_code() -> None:
    with pytest.raises(TypeError, match="code 1 belongs to policy 'typical'"):

        class Copy(Rule):
            code = Typical.code
            policy: Literal["copy"] = "copy"

    assert "copy" not in policies.policy_names()


@settings(quick, max_examples=15)  # nine rules on every row
@given(mismatch_rows())
def test_rules_decide_each_row_by_itself_and_change_nothing(rows: list[tuple[Any, ...]]) -> None:
    together = mismatches(rows)
    before = together.statistics.clone()
    for rule in RULES:
        kept = rule.keep(together)
        assert kept.tolist() == [rule.keep(mismatches([row])).item() for row in rows]
    assert torch.equal(together.statistics, before)


def test_every_registered_policy_is_covered_and_named_as_users_write_it() -> None:
    assert sorted(EXAMPLES) == sorted(policies.policy_names())
    for rule in RULES:
        assert policies.policy_class(rule.policy) is type(rule)
        assert TYPE_ADAPTER.validate_python(rule.model_dump()) == rule
        assert rule.describe().startswith(rule.policy)


@pytest.mark.parametrize(
    "parameters",
    [
        {"policy": "typical", "posterior_threshold": -0.1},
        {"policy": "typical", "posterior_threshold": 1.1},
        {"policy": "typical", "posterior_alpha": -1},
        {"policy": "typical", "posterior_alpha": INF},
        {"policy": "relaxed_topk", "top_n": 0},
        {"policy": "relaxed_topk", "top_n": 2.5},
        {"policy": "relaxed_topk", "delta": -0.1},
        {"policy": "relaxed_topk", "delta": 1.5},
        {"policy": "threshold", "single": 0},
        {"policy": "threshold", "single": 1.01},
        {"policy": "threshold", "acc": 0},
        {"policy": "threshold", "acc": 2},
        {"policy": "cascade", "alpha": -0.5},
        {"policy": "cascade", "alpha": 1.5},
        {"policy": "cascade", "alpha": math.nan},
        {"policy": "mars", "ratio": -0.1},
        {"policy": "mars", "ratio": 1.1},
        {"policy": "fly", "entropy_top_k": 0},
        {"policy": "fly", "entropy_top_k": 5},
        {"policy": "fly", "entropy_threshold": -1},
        {"policy": "fly", "window": 0},
        {"policy": "fly", "window": 128},
        {"policy": "kl", "max_kl": -1},
        {"policy": "kl", "max_kl": math.nan},
        {"policy": "entropy", "posterior_threshold": 0},
        {"policy": "entropy", "posterior_threshold": 1.1},
        {"policy": "entropy", "posterior_alpha": -0.1},
        {"policy": "ears", "tolerance": -0.1},
        {"policy": "ears", "tolerance": 1.1},
        {"policy": "mixture", "weight": 0},
        {"policy": "mixture", "weight": 1.1},
        {"policy": "fsd", "max_divergence": -0.1},
        {"policy": "fsd", "max_divergence": 1.1},
        {"policy": "fsd", "max_divergence": 0.1, "divergence": "kl"},
        {"policy": "random", "rate": -0.01},
        {"policy": "random", "rate": 1.01},
        {"policy": "random", "rate": 0.5, "seed": -1},
        {"policy": "random", "rate": 0.5, "seed": 2**31},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TYPE_ADAPTER.validate_python(parameters)


@pytest.mark.parametrize(
    ("parameters", "missing"),
    [
        ({"policy": "cascade"}, "alpha"),
        ({"policy": "kl"}, "max_kl"),
        ({"policy": "random"}, "rate"),
        ({"policy": "ears"}, "tolerance"),
        ({"policy": "mixture"}, "weight"),
        ({"policy": "fsd"}, "max_divergence"),
        ({"policy": "learned"}, "artefact"),
    ],
)
def test_parameters_without_a_safe_default_must_be_given(parameters: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValidationError, match=missing):
        TYPE_ADAPTER.validate_python(parameters)


@pytest.mark.parametrize("rule", [*RULES, Learned(artefact="somewhere")], ids=lambda rule: rule.policy)
def test_unknown_keys_are_refused(rule: Any) -> None:
    with pytest.raises(ValidationError, match="treshold"):
        TYPE_ADAPTER.validate_python({**rule.model_dump(), "treshold": 0.5})


@pytest.mark.parametrize("value", [{"policy": "tipical"}, {"policy": None}, {"policy": ["strict"]}, {}, "strict", 3])
def test_what_names_no_policy_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        TYPE_ADAPTER.validate_python(value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"policy": "typical", "posterior_threshold": "0.09"},
        {"policy": "typical", "posterior_threshold": None},
        {"policy": "relaxed_topk", "top_n": "3"},
        {"policy": "relaxed_topk", "top_n": True},
        {"policy": "cascade", "alpha": [0.5]},
        {"policy": "fly", "window": True},
        {"policy": "random", "rate": True},
        {"policy": "random", "rate": "1"},
        {"policy": "learned", "artefact": 3},
    ],
    ids=str,
)
def test_parameters_of_the_wrong_type_are_refused(parameters: dict[str, Any]) -> None:
    # JSON knows numbers from strings and booleans; {"rate": true} is a mistake, not a request to keep everything.
    with pytest.raises(ValidationError):
        TYPE_ADAPTER.validate_python(parameters)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.policy != "strict"], ids=lambda rule: rule.policy)
def test_parameters_cannot_be_changed(rule: Any) -> None:
    name = next(name for name in type(rule).model_fields if name != "policy")
    with pytest.raises(ValidationError):
        setattr(rule, name, 1)
