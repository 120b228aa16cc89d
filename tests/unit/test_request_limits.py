"""What a request may change is the operator's to say, and how far."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from vllm_cospec import patches
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
    "policy": "strict", "threshold": 0.7, "max_overrides": 3, "max_regret": 1.5, "exact_tokens": 4, "scope": "all",
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_request_changes_what_the_operator_lets_it_change(name: str) -> None:
    key, value = f"cospec_{name}", ASKED_FOR[name]
    others = tuple(other for other in ASKED_FOR if other != name)
    about = {"scope": "thinking", "thinking_tokens": (3, 4)} if name == "scope" else {}
    usual = server(Learned(artefact="arbiter"), **about)
    allowing = server(Learned(artefact="arbiter"), request_settings=(name,), **about)
    assert asked(allowing, **{key: value}) == asked(usual, **{key: value}) != asked(usual)
    for refusing in (others, ()):
        with pytest.raises(ConfigError, match=rf"^vllm_xargs.{key}: {value!r} is not .*\(request_settings\)") as caught:
            asked(server(Learned(artefact="arbiter"), request_settings=refusing), **{key: value})
        assert str(caught.value).isprintable()
    assert asked(server(Learned(artefact="arbiter"), request_settings=()), **{key: None}) == asked()


def test_a_scope_needs_the_tokens_between_which_the_model_thinks() -> None:
    known = server(Typical(), thinking_tokens=(3, 4))
    assert asked(known).scope == "all"
    assert asked(known, cospec_scope="answer").scope == "answer"
    assert asked(server(Typical(), thinking_tokens=(3, 4), scope="thinking")).scope == "thinking"
    assert asked(server(Typical()), cospec_scope="all").scope == "all"
    with pytest.raises(ConfigError, match=r"^vllm_xargs\.cospec_scope: 'thinking' needs .*--reasoning-parser"):
        asked(server(Typical()), cospec_scope="thinking")
    with pytest.raises(ConfigError, match=r"^vllm_xargs\.cospec_scope: .*'reasoning'"):
        asked(known, cospec_scope="reasoning")


def test_a_request_that_declares_tools_is_strict_unless_it_names_the_policy() -> None:
    assert not asked(server(Typical()), cospec_tools=1).arbitrated
    assert asked(server(Typical()), cospec_tools=0).arbitrated
    assert asked(server(Typical()), cospec_tools=1, cospec_policy="typical").arbitrated
    assert not asked(server(Typical(), request_settings=()), cospec_tools=1).arbitrated


@pytest.mark.parametrize(
    ("tools", "choice", "xargs", "strict"),
    [
        (["f"], "auto", None, True),
        (["f"], "required", {"mine": 1}, True),
        (["f"], "none", None, False),  # it may not call them
        ([], "auto", None, False),
        (["f"], "auto", {"cospec_policy": "learned"}, False),
    ],
)
def test_an_endpoint_tells_the_engine_of_tools(tools: list[str], choice: str, xargs: Any, strict: bool) -> None:
    config = SimpleNamespace(speculative_config=SimpleNamespace(cospec=LEARNED))
    serving = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))
    request = SimpleNamespace(vllm_xargs=xargs, tools=tools, tool_choice=choice)

    async def original(self: Any, request: Any, raw_request: Any) -> Any:
        return request.vllm_xargs

    passed = asyncio.run(patches._make_handler(original)(serving, request, None))
    assert request_settings(SamplingParams(extra_args=passed), LEARNED).arbitrated is not strict
    assert (passed or {}).get("mine") == (xargs or {}).get("mine")
