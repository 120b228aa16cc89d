"""What a request may set through ``vllm_xargs``, and that nothing it sends can reach the engine unchecked."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_cospec import patches
from vllm_cospec.config import Settings
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Learned, Policy, Strict, Typical
from vllm_cospec.requests import RequestSettings, action_coin, request_settings

NAN, INF = float("nan"), float("inf")
MAX_INT64 = 2**63 - 1


def server(policy: Policy, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "policy": policy,
        "threshold": 0.6,
        "max_overrides": 7,
        "exact_tokens": 2,
        "collect": False,
        "draft_logits": True,
        "num_speculative_tokens": 5,
        "counters": "",
    }
    return Settings(**values | changes)


LEARNED = server(Learned(artefact="arbiter"))
TYPICAL = server(Typical())
STRICT = server(Strict())


def asked(settings: Settings = LEARNED, /, **extra_args: Any) -> RequestSettings:
    return request_settings(SamplingParams(extra_args=extra_args), settings)


def asked_structured(settings: Settings = LEARNED, /, **extra_args: Any) -> RequestSettings:
    schema = StructuredOutputsParams(json={"type": "object"})
    return request_settings(SamplingParams(extra_args=extra_args, structured_outputs=schema), settings)


def assert_one_sentence(message: str) -> None:
    assert message.isprintable(), f"not one line: {message!r}"
    assert len(message) < 600


@pytest.mark.parametrize("params", [None, SamplingParams(), SamplingParams(extra_args={})])
def test_a_request_that_asks_for_nothing_gets_the_servers_settings(params: Any) -> None:
    assert request_settings(params, LEARNED) == RequestSettings(
        arbitrated=True, threshold=0.6, max_overrides=7, exact_tokens=2
    )


def test_the_coin_of_an_action_depends_on_seed_and_place_alone_and_is_uniform() -> None:
    coins = np.array([[action_coin(seed, place) for place in range(100)] for seed in range(100)])
    assert action_coin(7, 3) == coins[7, 3]
    assert len(np.unique(coins)) == coins.size
    assert ((coins >= 0) & (coins < 1)).all()
    for axis in (0, 1):
        assert abs(np.corrcoef(coins.mean(axis), np.arange(100))[0, 1]) < 0.35
    counts, _ = np.histogram(coins, 10, (0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 35  # chi-square, 9 degrees of freedom: p = 6e-5


@pytest.mark.parametrize(
    ("extra_args", "field", "value"),
    [
        ({"cospec_policy": "strict"}, "arbitrated", False),
        ({"cospec_policy": "learned"}, "arbitrated", True),
        ({"cospec_threshold": 0.75}, "threshold", 0.75),
        ({"cospec_threshold": 0.6}, "threshold", 0.6),
        ({"cospec_threshold": 1.0}, "threshold", 1.0),
        ({"cospec_threshold": 1}, "threshold", 1.0),
        ({"cospec_max_overrides": 3}, "max_overrides", 3),
        ({"cospec_max_overrides": 0}, "max_overrides", 0),
        ({"cospec_max_overrides": 1}, "max_overrides", 1),
        ({"cospec_exact_tokens": 40}, "exact_tokens", 40),
        ({"cospec_exact_tokens": 0}, "exact_tokens", 0),
        ({"cospec_exact_tokens": 1}, "exact_tokens", 1),
    ],
)
def test_each_key_overrides_the_server_and_leaves_the_rest(extra_args: dict[str, Any], field: str, value: Any) -> None:
    result = asked(**extra_args)
    expected = {"arbitrated": True, "threshold": 0.6, "max_overrides": 7, "exact_tokens": 2} | {field: value}
    assert result == RequestSettings(**expected)


def test_all_keys_together() -> None:
    result = asked(cospec_policy="learned", cospec_threshold=0.9, cospec_max_overrides=1, cospec_exact_tokens=9)
    assert result == RequestSettings(arbitrated=True, threshold=0.9, max_overrides=1, exact_tokens=9)


def test_a_null_leaves_the_servers_setting() -> None:
    names = ("policy", "threshold", "max_overrides", "max_regret", "exact_tokens")
    nulls = dict.fromkeys(f"cospec_{name}" for name in names)
    assert asked(**nulls) == asked()


def test_a_request_may_limit_overrides_where_the_server_does_not() -> None:
    unlimited = server(Typical(), max_overrides=None)
    assert asked(unlimited).max_overrides is None
    assert asked(unlimited, cospec_max_overrides=0).max_overrides == 0


NUMBERS = ["cospec_threshold", "cospec_max_overrides", "cospec_max_regret", "cospec_exact_tokens"]
BAD_NUMBERS = {
    "text": "0",
    "empty text": "",
    "word": "none",
    "true": True,
    "false": False,
    "list": [1],
    "empty list": [],
    "object": {"value": 1},
    "nan": NAN,
    "inf": INF,
    "minus inf": -INF,
    "negative": -1,
}


@pytest.mark.parametrize("value", BAD_NUMBERS.values(), ids=BAD_NUMBERS)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_bad_number_is_refused_in_one_sentence_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(**{key: value})
    assert f"vllm_xargs.{key}" in str(caught.value)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cospec_threshold", 1.0000001),
        ("cospec_threshold", -1e-9),
        ("cospec_threshold", 2),
        ("cospec_threshold", 10**18),
        ("cospec_max_overrides", 1.5),
        ("cospec_max_overrides", 1.0),
        ("cospec_exact_tokens", 0.5),
        ("cospec_exact_tokens", 2.0),
    ],
)
def test_a_number_out_of_range_or_not_whole_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"vllm_xargs.{key}: .*{value}"):
        asked(**{key: value})


@pytest.mark.parametrize("key", ["cospec_max_overrides", "cospec_max_regret", "cospec_exact_tokens"])
@pytest.mark.parametrize("value", [MAX_INT64 + 1, 2**64 - 1])  # the largest vLLM lets through in extra_args
def test_an_integer_the_engine_cannot_hold_is_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"vllm_xargs.{key}"):
        asked(**{key: value})


@pytest.mark.parametrize("key", ["max_overrides", "exact_tokens"])
def test_the_largest_integer_that_is_taken_fits_the_engines_arrays(key: str) -> None:
    accepted = []
    for bits in (31, 32, 48, 62, 63, 64):
        try:
            accepted.append(getattr(asked(**{f"cospec_{key}": 2**bits - 1}), key))
        except ConfigError:
            break
    assert accepted, "not even 2**31 - 1 is accepted"
    assert np.array(accepted, np.int64).tolist() == accepted


BAD_POLICIES = {
    "unknown": "typicl",
    "another rule": "typical",
    "wrong case": "Strict",
    "empty": "",
    "blank": " strict",
    "number": 1,
    "zero for false": 0,
    "true": True,
    "list": ["strict"],
    "object": {"policy": "strict"},
    "line break": "strict\n",
    "null byte": "strict\0",
    "5000 characters": "x" * 5000,
}


@pytest.mark.parametrize("value", BAD_POLICIES.values(), ids=BAD_POLICIES)
def test_a_policy_that_is_not_served_is_refused_in_one_sentence(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(cospec_policy=value)
    assert "vllm_xargs.cospec_policy" in str(caught.value)
    assert_one_sentence(str(caught.value))


def test_the_refusal_of_a_policy_says_what_is_served() -> None:
    with pytest.raises(ConfigError, match=r"'fly'.*'strict' or 'learned'"):
        asked(cospec_policy="fly")
    with pytest.raises(ConfigError, match=r"'typical'.*pass 'strict'$"):
        asked(STRICT, cospec_policy="typical")


UNKNOWN_KEYS = {
    "near miss": "cospec_treshold",
    "server's key": "cospec_collect",
    "prefix alone": "cospec_",
    "line break": "cospec_\nthreshold",
    "5000 characters": "cospec_" + "x" * 5000,
}


@pytest.mark.parametrize("key", UNKNOWN_KEYS.values(), ids=UNKNOWN_KEYS)
def test_an_unknown_key_of_ours_is_refused_and_the_known_ones_are_listed(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        asked(**{key: 1})
    for known in ("cospec_policy", "cospec_threshold", "cospec_max_overrides", "cospec_exact_tokens"):
        assert known in str(caught.value)
    assert_one_sentence(str(caught.value))


def test_the_unknown_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"vllm_xargs\.cospec_treshold"):
        asked(cospec_treshold=0.5)


@pytest.mark.parametrize(
    "key", ["threshold", "policy", "cospec", "cospecpolicy", "Cospec_policy", "other_cospec_policy"]
)
def test_keys_of_other_extensions_are_ignored(key: str) -> None:
    assert asked(**{key: object()}) == asked()


@pytest.mark.parametrize("settings", [LEARNED, TYPICAL], ids=["learned", "typical"])
def test_structured_output_is_strict_unless_the_request_asks_otherwise(settings: Settings) -> None:
    assert not asked_structured(settings).arbitrated
    assert asked_structured(settings, cospec_policy=settings.policy.policy).arbitrated
    assert not asked_structured(settings, cospec_policy="strict").arbitrated
    assert not asked_structured(settings, cospec_max_overrides=5).arbitrated


def test_a_threshold_alone_does_not_arbitrate_structured_output() -> None:
    result = asked_structured(cospec_threshold=0.7)
    assert (result.arbitrated, result.threshold) == (False, 0.7)


def test_a_strict_server_arbitrates_nothing() -> None:
    assert not asked(STRICT).arbitrated
    assert not asked(STRICT, cospec_policy="strict").arbitrated
    assert not asked_structured(STRICT).arbitrated
    assert not asked(STRICT, cospec_max_overrides=100, cospec_exact_tokens=0).arbitrated


@pytest.mark.parametrize("policy", ["learned", "typical"])
def test_a_strict_server_cannot_be_talked_into_arbitration(policy: str) -> None:
    with pytest.raises(ConfigError, match=r"vllm_xargs\.cospec_policy"):
        asked(STRICT, cospec_policy=policy)


@pytest.mark.parametrize("settings", [TYPICAL, STRICT], ids=["typical", "strict"])
def test_a_threshold_is_refused_where_no_trained_arbiter_serves(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=rf"vllm_xargs\.cospec_threshold: 0\.5 .*{settings.policy.policy}"):
        asked(settings, cospec_threshold=0.5)


def test_a_strict_request_may_carry_a_threshold() -> None:
    assert not asked(cospec_policy="strict", cospec_threshold=0.7).arbitrated


def test_a_requests_extra_args_are_not_changed() -> None:
    extra_args = {"cospec_policy": "strict", "cospec_exact_tokens": 4, "other": [1]}
    params = SamplingParams(extra_args=dict(extra_args))
    request_settings(params, LEARNED)
    assert params.extra_args == extra_args


def processed(
    params: Any, cospec: Any = LEARNED, method: str = "draft_model", sees_images: Any = False, **unseen: Any
) -> Any:
    """Take a request through what stands around vLLM's input processor; returns what goes to the engine."""
    config = SimpleNamespace(method=method, draft_model_config=SimpleNamespace(is_multimodal_model=sees_images))
    if cospec is not None:
        config.cospec = cospec

    def original(self: Any, request_id: Any, prompt: Any, params: Any, supported_tasks: Any) -> Any:
        sampling = params.clone() if isinstance(params, SamplingParams) else None
        request = {"prompt_embeds": None, "mm_features": None, "lora_request": None, "resumable": False} | unseen
        return SimpleNamespace(sampling_params=sampling, **request)

    process_inputs = patches._make_process_inputs(original)
    return process_inputs(SimpleNamespace(speculative_config=config), "id", "prompt", params, supported_tasks=())


def policy_of(request: Any) -> Any:
    return (request.sampling_params.extra_args or {}).get("cospec_policy")


def test_a_bad_value_is_the_error_the_server_turns_into_a_400() -> None:
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs\.cospec_threshold") as caught:
        processed(SamplingParams(extra_args={"cospec_threshold": "high"}))
    assert caught.value.parameter == "vllm_xargs"


def test_good_requests_and_other_kinds_pass_unchanged() -> None:
    for extra_args in ({"cospec_policy": "strict"}, {"cospec_policy": "learned", "mine": 1}, None):
        assert processed(SamplingParams(extra_args=extra_args)).sampling_params.extra_args == extra_args
    assert processed(PoolingParams()).sampling_params is None


def test_without_cospec_the_keys_mean_nothing() -> None:
    params = SamplingParams(extra_args={"cospec_threshold": "high"})
    request = processed(params, cospec=None, lora_request=object())
    assert request.sampling_params.extra_args == {"cospec_threshold": "high"}


IMAGE: dict[str, Any] = {"mm_features": [object()]}
EMBEDDINGS: dict[str, Any] = {"prompt_embeds": object()}
ADAPTER: dict[str, Any] = {"lora_request": object()}
IN_PARTS: dict[str, Any] = {"resumable": True}


@pytest.mark.parametrize(
    "unseen", [IMAGE, EMBEDDINGS, ADAPTER, IN_PARTS], ids=["image", "embeddings", "adapter", "in parts"]
)
def test_what_the_drafter_does_not_see_is_verified_strictly(unseen: Any) -> None:
    params = SamplingParams(extra_args={"mine": 1})
    request = processed(params, **unseen)
    assert request.sampling_params.extra_args == {"mine": 1, "cospec_policy": "strict"}
    assert params.extra_args == {"mine": 1}  # the caller's own is as it was
    assert policy_of(processed(SamplingParams(), **unseen)) == "strict"
    assert policy_of(processed(SamplingParams(extra_args={"cospec_policy": "strict"}), **unseen)) == "strict"


def test_a_request_with_an_adapter_may_name_the_policy_all_the_same() -> None:
    params = SamplingParams(extra_args={"cospec_policy": "learned"})
    assert policy_of(processed(params, **ADAPTER)) == "learned"


@pytest.mark.parametrize("unseen", [IMAGE, EMBEDDINGS, IN_PARTS], ids=["image", "embeddings", "in parts"])
def test_no_policy_judges_drafts_made_without_the_prompt(unseen: Any) -> None:
    with pytest.raises(VLLMValidationError, match=r"cospec_policy: 'learned' needs a drafter that sees"):
        processed(SamplingParams(extra_args={"cospec_policy": "learned"}), **unseen)


@pytest.mark.parametrize(("method", "sees_images"), [("draft_model", True), ("eagle3", False), ("ngram", False)])
def test_a_drafter_that_sees_the_image_or_the_targets_states_is_trusted_with_it(method: str, sees_images: Any) -> None:
    assert policy_of(processed(SamplingParams(), method=method, sees_images=sees_images, **IMAGE)) is None


def handled(written: Any, read: Any = None, cospec: Any = LEARNED) -> Any:
    """Send a request's keys through what stands around an endpoint's method; ``read``: as vLLM's protocol has them."""
    config = SimpleNamespace() if cospec is None else SimpleNamespace(cospec=cospec)
    serving = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=config)))
    request = SimpleNamespace(vllm_xargs=written if read is None else read, use_beam_search=True)

    class Raw:
        async def json(self) -> Any:
            return {"vllm_xargs": written}

    async def original(self: Any, request: Any, raw_request: Any) -> Any:
        return "answered"

    return asyncio.run(patches._make_handler(original)(serving, request, Raw()))


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [True, False])
def test_true_is_no_number_although_the_protocol_reads_it_as_one(key: str, value: Any) -> None:
    with pytest.raises(VLLMValidationError, match=rf"vllm_xargs\.{key}: .* got {value}"):
        handled({key: value}, read={key: int(value)})


def test_keys_that_beam_search_would_drop_are_checked() -> None:
    with pytest.raises(VLLMValidationError, match=r"vllm_xargs\.cospec_policy: 'bogus' is not served here"):
        handled({"cospec_policy": "bogus"})
    assert handled({"cospec_policy": "strict", "cospec_threshold": 0.7}) == "answered"


def test_keys_of_others_and_servers_without_cospec_are_left_alone() -> None:
    assert handled({"mine": True}, read={"mine": 1}) == "answered"
    assert handled(None, read={}) == "answered"
    assert handled({"cospec_policy": "bogus"}, cospec=None) == "answered"
