"""What a request may change is the operator's to say, and how far."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from vllm_cospec.config import Settings
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Learned, Policy, Typical
from vllm_cospec.requests import RequestSettings, request_settings


def server(policy: Policy, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "policy": policy, "threshold": 0.6, "max_overrides": 7, "exact_tokens": 2, "collect": False,
        "draft_logits": True, "num_speculative_tokens": 5, "counters": "",
    }  # fmt: skip
    return Settings(**values | changes)


LEARNED = server(Learned(artefact="arbiter"))


def asked(settings: Settings = LEARNED, /, **extra_args: Any) -> RequestSettings:
    return request_settings(SamplingParams(extra_args=extra_args), settings)


def test_a_request_may_spend_less_regret_than_the_server_allows_and_no_more() -> None:
    assert asked(server(Typical())).max_regret is None
    assert asked(server(Typical()), cospec_max_regret=9.5).max_regret == 9.5
    limited = server(Typical(), max_regret=2.5)
    assert asked(limited).max_regret == 2.5
    assert asked(limited, cospec_max_regret=2.5).max_regret == 2.5
    assert asked(limited, cospec_max_regret=0).max_regret == 0
    with pytest.raises(ConfigError, match=r"^vllm_xargs.cospec_max_regret: 2.75 is more than this server's 2.5; "):
        asked(limited, cospec_max_regret=2.75)


@pytest.mark.parametrize("value", [-0.5, 8192.5])
def test_a_budget_of_regret_that_cannot_be_counted_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=f"vllm_xargs.cospec_max_regret: .*{value}"):
        asked(cospec_max_regret=value)


ASKED_FOR = {
    "policy": "strict", "threshold": 0.7, "max_overrides": 3, "max_regret": 1.5, "exact_tokens": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_request_changes_what_the_operator_lets_it_change(name: str) -> None:
    key, value = f"cospec_{name}", ASKED_FOR[name]
    others = tuple(other for other in ASKED_FOR if other != name)
    allowing = server(Learned(artefact="arbiter"), request_settings=(name,))
    assert asked(allowing, **{key: value}) == asked(LEARNED, **{key: value}) != asked(LEARNED)
    for refusing in (others, ()):
        with pytest.raises(ConfigError, match=rf"^vllm_xargs.{key}: {value!r} is not .*\(request_settings\)") as caught:
            asked(server(Learned(artefact="arbiter"), request_settings=refusing), **{key: value})
        assert str(caught.value).isprintable()
    assert asked(server(Learned(artefact="arbiter"), request_settings=()), **{key: None}) == asked()
