"""Whatever is wrong with a configuration ends in one sentence, before any engine process exists."""

from typing import Any

import pytest
from configurations import INF, LEFT_OUT, NAN, Pair, refused, user_config


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def rule(name: Any, **parameters: Any) -> dict[str, Any]:
    return {"arbiter": {"policy": name, **parameters}}


def wrong(field: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return cases of one key with each of these values, named after the value; the message must name the key."""
    return {f"{field} {name}": ({field: value}, f"speculative_config.{field}") for name, value in values.items()}


def wrong_parameter(policy: str, parameter: str, values: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Return cases of one parameter of a policy with each of these values; the message must name the parameter."""
    return {
        f"{policy} {parameter} {name}": (rule(policy, **others, **{parameter: value}), f"arbiter.{parameter}")
        for name, value in values.items()
    }


NOT_NUMBERS = {"text": "0.5", "true": True, "list": [0.5], "object": {}, "nan": NAN, "inf": INF, "minus inf": -INF}
NOT_INTEGERS = NOT_NUMBERS | {"text": "5", "fraction": 1.5, "whole float": 5.0}
NOT_STRINGS = {"number": 5, "true": True, "list": [], "object": {}}
NOT_IN_INT64 = {"one too many for int64": 2**63, "huge": 10**30}
NGRAM = {"draft_method": "ngram", "model": LEFT_OUT}

OWN_FIELDS = {
    **wrong("threshold", NOT_NUMBERS | {"negative": -0.01, "above one": 1.01, "huge": 10**400, "nested": nested(900)}),
    **wrong("max_accuracy_loss", NOT_NUMBERS | {"zero": 0, "above one": 2}),
    **wrong("max_regret", NOT_NUMBERS | {"negative": -0.1, "more than can be counted": 8193}),
    **wrong("request_settings", {"text": "policy", "number": 1, "another": ["branch"], "null": None, "object": {}}),
    **wrong("scope", NOT_STRINGS | {"null": None, "another word": "reasoning"}),
    **wrong(
        "thinking_tokens",
        {
            "text": "3",
            "number": 3,
            "one": [3],
            "three": [3, 4, 5],
            "alike": [3, 3],
            "negative": [-1, 3],
            "words": ["<think>", "</think>"],
        },
    ),
    **wrong("on_drift", NOT_STRINGS | {"null": None, "another word": "warn"}),
    **wrong("drift_pause", NOT_INTEGERS | {"none": 0, "negative": -1}),
    "drift_pause where nothing pauses": ({"drift_pause": 5}, "drift_pause is for on_drift"),
    "on_drift of a rule": ({"on_drift": "strict"}, "on_drift is for a trained arbiter"),
    **wrong("on_mismatch", NOT_STRINGS | {"null": None, "another word": "ignore"}),
    **wrong("max_overrides", NOT_INTEGERS | NOT_IN_INT64 | {"negative": -1}),
    **wrong("exact_tokens", NOT_INTEGERS | NOT_IN_INT64 | {"negative": -1, "null": None}),
    **wrong("collect", {"text": "true", "number": 1, "null": None, "list": [True]}),
    **wrong("draft_method", NOT_STRINGS),
    **wrong("arbiter", NOT_STRINGS | {"empty": "", "list of policies": [{"policy": "typical"}]}),
    **wrong("arbiter", {"null": None, "left out": LEFT_OUT, "nested": nested(900), "nested deeper": nested(20_000)}),
    "both knobs": ({"threshold": 0.5, "max_accuracy_loss": 0.1}, "max_accuracy_loss exclude"),
    "threshold of a rule": ({"threshold": 0.5}, "threshold is for a trained arbiter"),
    "on_mismatch of a rule": ({"on_mismatch": "refuse"}, "on_mismatch is for a trained arbiter"),
    "max_accuracy_loss of a rule": ({"max_accuracy_loss": 0.5}, "max_accuracy_loss is for a trained arbiter"),
    "draft_method unknown": ({"draft_method": "eagle4"}, "draft_method 'eagle4' is not supported"),
    "draft_method in capitals": ({"draft_method": "NGRAM"}, "draft_method 'NGRAM' is not supported"),
    "draft_method cospec": ({"draft_method": "cospec"}, "draft_method 'cospec' is not supported"),
    "draft_method of vLLM's that we lack": ({"draft_method": "medusa"}, "draft_method 'medusa' is not supported"),
    "draft_method empty": ({"draft_method": ""}, "draft_method '' is not supported"),
    "draft_method of 5000 characters": ({"draft_method": "x" * 5000}, "draft_method"),
    "draft_method with a line break": ({"draft_method": "ng\nram"}, "draft_method"),
    "mtp of a target without it": ({"draft_method": "mtp", "model": LEFT_OUT}, "mtp"),
    "arbiter a policy's name": ({"arbiter": "typical"}, "speculative_config.arbiter: no directory at 'typical'"),
}

UNKNOWN_KEYS = {
    "near miss of threshold": ({"treshold": 0.5}, "treshold: unknown key (value 0.5); did you mean 'threshold'?"),
    "near miss of max_overrides": ({"max_override": 1}, "did you mean 'max_overrides'?"),
    "near miss with dashes": ({"max-overides": 1}, "did you mean 'max_overrides'?"),
    "near miss of arbiter": ({"arbitor": "x"}, "did you mean 'arbiter'?"),
    "near miss of draft_method": ({"draft_mehtod": "ngram"}, "did you mean 'draft_method'?"),
    "near miss of vLLM's key": ({"num_speculative_token": 3}, "did you mean 'num_speculative_tokens'?"),
    **wrong("xyzzy", {"number": 1, "5000 characters": "x" * 5000, "long list": [1] * 5000, "nested": nested(900)}),
    **wrong("policy", {"beside the arbiter": "typical"}),
    **wrong("cospec_threshold", {"of a request": 0.5}),
    **wrong("target_model_config", {"of vLLM's own making": {}}),
    "empty key": ({"": 1}, "unknown key"),
    "key with a line break": ({"foo\nbar": 1}, "unknown key"),
    "key with an escape sequence": ({"\x1b[31mfoo": 1}, "unknown key"),
    "key of 5000 characters": ({"x" * 5000: 1}, "unknown key"),
    "key that is a number": ({5: 1}, "speculative_config.5"),
    "key that is null": ({None: 1}, "speculative_config.None"),
    "one key in two spellings": ({"max-overrides": 1, "max_overrides": 2}, "max_overrides"),
}

POLICIES = {
    "policy unknown": (rule("typicl"), "speculative_config.arbiter.policy: unknown policy 'typicl'"),
    "policy in capitals": (rule("Typical"), "unknown policy 'Typical'"),
    "policy empty": (rule(""), "unknown policy ''"),
    "policy null": (rule(None), "speculative_config.arbiter.policy"),
    "policy number": (rule(5), "speculative_config.arbiter.policy"),
    "policy list": (rule(["typical"]), "speculative_config.arbiter.policy"),
    "policy object": (rule({"policy": "typical"}), "speculative_config.arbiter.policy"),
    "policy nested": (rule(nested(900)), "speculative_config.arbiter"),
    "policy of 5000 characters": (rule("x" * 5000), "speculative_config.arbiter.policy"),
    "policy with a line break": (rule("typ\nical"), "speculative_config.arbiter.policy"),
    "policy missing": ({"arbiter": {"posterior_alpha": 0.3}}, "speculative_config.arbiter"),
    "policy under another key": ({"arbiter": {"name": "typical"}}, "speculative_config.arbiter"),
    "learned without artefact": (rule("learned"), "speculative_config.arbiter.artefact: missing"),
    "learned with an empty artefact": (rule("learned", artefact=""), "speculative_config.arbiter"),
    "cascade without alpha": (rule("cascade"), "speculative_config.arbiter.alpha: missing"),
    "kl without max_kl": (rule("kl"), "speculative_config.arbiter.max_kl: missing"),
    "kl with ngram": (rule("kl", max_kl=1) | NGRAM, "speculative_config.arbiter: policy 'kl' needs draft logits"),
    "random without rate": (rule("random"), "speculative_config.arbiter.rate: missing"),
    "fly with a block of one": (rule("fly") | {"num_speculative_tokens": 1}, "speculative_config.arbiter.window"),
    "typical with a key of 5000 characters": (rule("typical", **{"x" * 5000: 1}), "speculative_config.arbiter"),
    "typical with a line break in a key": (rule("typical", **{"a\nb": 1}), "speculative_config.arbiter"),
    **wrong_parameter("learned", "artefact", NOT_STRINGS | {"null": None}),
    **wrong_parameter("learned", "threshold", {"inside": 0.5}, artefact="x"),
    **wrong_parameter("cascade", "alpha", NOT_NUMBERS | {"null": None, "above one": 1.5, "negative": -0.1}),
    **wrong_parameter("cascade", "beta", {"unknown": 1}, alpha=0.5),
    **wrong_parameter("kl", "max_kl", NOT_NUMBERS | {"negative": -1}),
    **wrong_parameter("random", "rate", NOT_NUMBERS | {"above one": 1.01}),
    **wrong_parameter("random", "seed", NOT_INTEGERS | {"negative": -1, "too large": 2**31}, rate=0.5),
    **wrong_parameter("typical", "posterior_threshold", NOT_NUMBERS | {"negative": -1}),
    **wrong_parameter("typical", "posterior_alpha", {"inf": INF, "5000 characters": "x" * 5000}),
    **wrong_parameter("typical", "posterior_treshold", {"misspelt": 0.1}),
    **wrong_parameter("relaxed_topk", "top_n", NOT_INTEGERS | {"zero": 0, "too large for a float": 10**400}),
    **wrong_parameter("relaxed_topk", "delta", {"above one": 1.1}),
    **wrong_parameter("threshold", "single", {"zero": 0}),
    **wrong_parameter("threshold", "acc", {"word": "high"}),
    **wrong_parameter("threshold", "threshold", {"unknown": 0.4}),
    **wrong_parameter("mars", "ratio", {"negative": -0.1}),
    **wrong_parameter("strict", "alpha", {"unknown": 1}),
    **wrong_parameter("fly", "window", {"zero": 0, "as long as the block": 3, "too large": 128}),
    **wrong_parameter("fly", "entropy_top_k", {"zero": 0, "too large": 5}),
    **wrong_parameter("fly", "entropy_threshold", {"negative": -1}),
}

ENGINES_KEYS = {
    **wrong("model", NOT_STRINGS | {"null": None, "left out": LEFT_OUT, "nested": nested(900), "long": ["x"] * 9000}),
    **wrong("num_speculative_tokens", {"zero": 0, "negative": -1, "fraction": 1.5, "whole float": 3.0, "text": "5"}),
    **wrong("num_speculative_tokens", {"true": True, "huge": 10**9, "too large": 129, "beyond printing": 10**5000}),
    **wrong("num_speculative_tokens", {"nan": NAN, "list": [3], "object": {"value": 3}, "nested": nested(900)}),
    **wrong("num_speculative_tokens", {"null": None, "left out": LEFT_OUT}),
    **wrong("rejection_sample_method", {"fly": "fly", "synthetic": "synthetic", "number": 5, "long": ["x" * 3000]}),
    **wrong("use_heterogeneous_vocab", {"true": True, "text": "yes"}),
    **wrong("parallel_drafting", {"true": True}),
    **wrong("disable_padded_drafter_batch", {"true": True}),
    "model left out of eagle": ({"model": LEFT_OUT, "draft_method": "eagle"}, "speculative_config.model"),
    # the sentence for these is vLLM's
    **{
        f"draft_tensor_parallel_size {name}": ({"draft_tensor_parallel_size": value}, "draft_tensor_parallel_size")
        for name, value in {"zero": 0, "negative": -1, "text": "two", "fraction": 1.5, "list": [1], "other": 2}.items()
    },
    "enable_adaptive_verification": (
        {"enable_adaptive_verification": True},
        "how much of a block is verified would depend on what else is served",
    ),
    "num_speculative_tokens_per_batch_size": (
        {"num_speculative_tokens_per_batch_size": [[1, 4, 3]]},
        "num_speculative_tokens_per_batch_size",
    ),
    "max_model_len negative": ({"max_model_len": -5}, "max_model_len"),
    "max_model_len text": ({"max_model_len": "long"}, "max_model_len"),
    "max_model_len beyond the model's": ({"max_model_len": 10**9}, "max_model_len"),
    "quantization unknown": ({"quantization": "made-up"}, "quantization"),
    "quantization of 5000 characters": ({"quantization": "x" * 5000}, "quantization"),
    "quantization nested": ({"quantization": nested(900)}, "quantization"),
    "attention_backend unknown": ({"attention_backend": "made-up"}, "attention_backend"),
    "draft_sample_method unknown": ({"draft_sample_method": "best"}, "draft_sample_method"),
    "enforce_eager text": ({"enforce_eager": "perhaps"}, "enforce_eager"),
    "revision number": ({"revision": 5}, "revision"),
    "tensor_parallel_size": ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
    "synthetic_acceptance_length": ({"synthetic_acceptance_length": 2.0}, "synthetic_acceptance_length"),
    "prompt_lookup_max zero": (NGRAM | {"prompt_lookup_max": 0}, "prompt_lookup_max"),
    "prompt_lookup_min too large": (NGRAM | {"prompt_lookup_max": 2, "prompt_lookup_min": 5}, "prompt_lookup_min"),
}

MALFORMED = OWN_FIELDS | UNKNOWN_KEYS | POLICIES | ENGINES_KEYS


@pytest.mark.parametrize(("changes", "names"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_configuration_is_refused_in_one_sentence(pair: Pair, changes: dict[Any, Any], names: str) -> None:
    refused(pair.target, user_config(pair, changes), names)


ENGINE_SETTINGS = {
    "worker_cls": ({"worker_cls": "mine.Worker"}, "worker_cls: 'mine.Worker'"),
    "scheduler_cls": ({"scheduler_cls": "mine.Scheduler"}, "scheduler_cls: 'mine.Scheduler'"),
    "pipeline_parallel_size": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: 2"),
    "decode_context_parallel_size": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "decode_context_parallel_size: 2",
    ),
    "watermark_config": ({"watermark_config": {"key": 5}}, "watermark_config: is set"),
    "batch-sharded sampling": ({"enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling: is set"),
    "spec_method": ({"spec_method": "ngram"}, "--spec-method"),
    "spec_model": ({"spec_model": "org/draft"}, "--spec-model"),
    "spec_tokens": ({"spec_tokens": 3}, "--spec-tokens"),
}


@pytest.mark.parametrize(("engine", "names"), ENGINE_SETTINGS.values(), ids=ENGINE_SETTINGS)
def test_settings_of_the_engine_that_exclude_cospec_are_refused_in_one_sentence(
    pair: Pair, engine: dict[str, Any], names: str
) -> None:
    refused(pair.target, user_config(pair), names, **engine)


def test_there_are_more_than_a_hundred_malformed_configurations() -> None:
    assert len(MALFORMED) + len(ENGINE_SETTINGS) > 100  # paths, artefacts, drafts and recipes not counted
