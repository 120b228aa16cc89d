"""The translation of ``{"method": "cospec"}`` to vLLM's ``SpeculativeConfig`` for the inner drafter.

More than a hundred places of vLLM switch on the method, so it never sees ours: the drafter's stands there, and this
package's settings ride on the object as ``.cospec``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm.logger import init_logger

from vllm_cospec import compat
from vllm_cospec.config import OWN_KEYS, WHERE, CoSpecConfig, Settings, asked_for, names_us
from vllm_cospec.errors import CompatibilityError, ConfigError, first_sentence, reason, shorten
from vllm_cospec.kernels.policies import Learned, policy_names
from vllm_cospec.patches import replace_front_end, sentence_alone, under_vllms_command
from vllm_cospec.recipe import RECIPE_FILE, Hub, is_file, load_recipe, locate_artefact, looks_local
from vllm_cospec.settle import OWN_WEIGHTS, settle_loaded

logger = init_logger("vllm.cospec")

SCHEDULER = "vllm_cospec.scheduler.CoSpecScheduler"

_announced: set[str] = set()


def make_create_speculative_config(original: Any) -> Any:
    """Return ``EngineArgs.create_speculative_config`` with the method "cospec" in it."""

    @functools.wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        method = getattr(self, "spec_method", None)
        raw = self.speculative_config
        if not asked_for(raw) and not names_us(method):
            return original(self, target_model_config, target_parallel_config)
        with sentence_alone():
            raw = _merge_short_flags(self, raw or {})
            return _translate(original, self, raw, target_model_config, target_parallel_config)

    return create_speculative_config


def _merge_short_flags(engine_args: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the configuration with --spec-method, --spec-model and --spec-tokens in it."""
    merged = dict(raw)
    for attribute, key in (
        ("spec_method", "method"),
        ("spec_model", "model"),
        ("spec_tokens", "num_speculative_tokens"),
    ):
        value = getattr(engine_args, attribute, None)
        if value is None:
            continue
        if key in merged:
            flag = attribute.replace("_", "-")
            raise ConfigError(
                f"{WHERE}.{key}: given twice, here or by a speculators checkpoint, and as --{flag}; "
                f"use --speculative-config alone"
            )
        merged[key] = value
    return merged


def resolve(
    raw: dict[str, Any],
    target: str,
    engine_keys: frozenset[str],
    hub: Hub = Hub(),  # noqa: B008 - frozen
) -> tuple[CoSpecConfig, dict[str, Any]]:
    """Split a user's keys into this package's and vLLM's, filling what is left out from the recipe.

    Args:
        raw: ``--speculative-config`` as parsed, with ``method`` "cospec". Not changed.
        target: the target model, a directory or hub id.
        engine_keys: the names vLLM's SpeculativeConfig knows.
        hub: how to reach the hub.

    Returns:
        The configuration with ``arbiter`` turned into a policy, and the keyword arguments for vLLM.

    Raises:
        ConfigError: one sentence naming the field, the value and the way out.
    """
    explicit: dict[str, Any] = {}
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name in explicit:
            raise ConfigError(f"{WHERE}.{name}: given twice, with dashes and with underscores; leave one out")
        explicit[name] = value
    explicit.pop("method", None)
    _refuse_unknown(explicit, engine_keys, WHERE)
    recipe, path = load_recipe(target, hub)
    _refuse_unknown(recipe, engine_keys, str(path))
    merged = recipe | explicit
    knobs = {"threshold", "max_accuracy_loss"}
    if explicit.keys() & (
        knobs | {"arbiter"}
    ):  # the recipe's knob belongs to its own arbiter, and there is only one knob
        for key in knobs - explicit.keys():
            merged.pop(key, None)
    if "arbiter" in explicit and "on_mismatch" not in explicit:  # likewise
        merged.pop("on_mismatch", None)
    try:
        config = CoSpecConfig.model_validate({key: value for key, value in merged.items() if key in OWN_KEYS})
    except ValidationError as error:
        raise ConfigError(first_sentence(error, WHERE, hide=policy_names())) from None
    inner = {key: value for key, value in merged.items() if key not in OWN_KEYS}
    if config.arbiter is None:
        raise ConfigError(
            f"{WHERE}.arbiter: missing, and {target!r} has no {RECIPE_FILE} that names one; pass the path of an "
            f'artefact or {{"policy": NAME}} with NAME from {", ".join(policy_names())}'
        )
    policy = config.arbiter
    if policy.arbiter is not None:
        policy = Learned(artefact=str(locate_artefact(policy.arbiter, hub)))
    _check_inner(config, inner, target)
    return config.model_copy(update={"arbiter": policy}), inner


def _refuse_unknown(keys: dict[str, Any], engine_keys: frozenset[str], where: str) -> None:
    for key, value in keys.items():
        if key not in OWN_KEYS and key not in engine_keys:
            close = difflib.get_close_matches(key, [*OWN_KEYS, *engine_keys], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"remove it; own keys are {', '.join(sorted(OWN_KEYS))}"
            raise ConfigError(f"{where}.{key[:80]}: unknown key (value {shorten(value)}); {hint}")


def _check_inner(config: CoSpecConfig, inner: dict[str, Any], target: str) -> None:
    """Complete and check vLLM's own keys where vLLM's message would come late or from deep inside."""
    if config.draft_method is not None:
        inner["method"] = config.draft_method
    model, count = inner.get("model"), inner.get("num_speculative_tokens")
    if model is None and config.draft_method in (None, *OWN_WEIGHTS):
        raise ConfigError(
            f"{WHERE}.model: missing, and {target!r} has no {RECIPE_FILE} that names a draft model; "
            f'pass "model": DRAFT, or "draft_method": "ngram" to draft without one'
        )
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"{WHERE}.model: must be a path or hub id, got {shorten(model)}")
    if model is not None and looks_local(model) and not is_file(Path(model) / "config.json"):
        raise ConfigError(
            f"{WHERE}.model: no model at {model!r} (config.json is missing); pass a model directory or hub id"
        )
    if model is not None and looks_local(model):
        try:
            described = isinstance(json.loads((Path(model) / "config.json").read_bytes()), dict)
        except (OSError, ValueError, RecursionError):
            described = False
        if not described:
            raise ConfigError(f"{WHERE}.model: config.json at {model!r} is no JSON object; copy the model again")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 128):
        raise ConfigError(f"{WHERE}.num_speculative_tokens: must be an integer from 1 to 128, got {shorten(count)}")
    if count is None and config.draft_method not in ("mtp", "suffix"):
        raise ConfigError(
            f"{WHERE}.num_speculative_tokens: missing; pass the number of draft tokens per step, for example 5"
        )
    load = ": how much of a block is verified would depend on what else is served, and with it an arbitrated text"
    for key, only, why in (
        ("rejection_sample_method", "standard", ""),
        ("use_heterogeneous_vocab", False, ""),
        ("disable_padded_drafter_batch", False, ": heads drafted otherwise in company"),
        ("enable_adaptive_verification", False, load),
        ("num_speculative_tokens_per_batch_size", None, load),
    ):
        if inner.get(key, only) != only:
            value = shorten(inner[key])
            raise ConfigError(f"{WHERE}.{key}: {value} cannot be combined with cospec{why}; leave it out")


def _translate(
    original: Any, engine_args: Any, raw: dict[str, Any], target_model_config: Any, target_parallel_config: Any
) -> Any:
    """Build vLLM's SpeculativeConfig for the inner drafter, with our settings riding on it."""
    from vllm.config.speculative import SpeculativeConfig

    worker = _worker_class(target_parallel_config)
    engine_keys = frozenset(field.name for field in dataclasses.fields(SpeculativeConfig)) - {
        "method", "target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config",
    }  # fmt: skip
    if engine_args.scheduler_cls not in (None, SCHEDULER):
        raise CompatibilityError(
            f"scheduler_cls: {engine_args.scheduler_cls!r} cannot be combined with cospec, which brings its own "
            f"scheduler; leave it out"
        )
    for name, value in (
        ("watermark_config", getattr(engine_args, "watermark_config", None)),
        ("enable_batch_sharded_sampling", target_parallel_config.enable_batch_sharded_sampling),
    ):
        if value:
            raise CompatibilityError(
                f"{name}: is set, and cannot be combined with cospec, which brings its own verification; leave it out"
            )
    hub = Hub(
        revision=target_model_config.revision,
        cache_dir=getattr(engine_args, "download_dir", None),
        token=getattr(engine_args, "hf_token", None),
    )
    config, inner = resolve(raw, target_model_config.model, engine_keys, hub)
    if config.collect and under_vllms_command():
        raise ConfigError(
            f"{WHERE}.collect: True keeps every decision in memory until a program takes it, and nobody takes it from "
            f"this server; leave it out, or collect with LLM(...) in a program of your own"
        )
    if inner.get("parallel_drafting"):
        raise ConfigError(f"{WHERE}.parallel_drafting: cannot be combined with cospec; leave it out")
    draws = config.collect or (config.arbiter is not None and config.arbiter.draws_drafts)
    if draws and config.draft_method not in ("ngram", "suffix"):
        inner.setdefault("draft_sample_method", "probabilistic")  # else vLLM's default, and on a GPU no draft logits

    stand_in = copy.copy(engine_args)  # the user's arguments are read again by other API servers: never change them
    stand_in.speculative_config = inner
    for name in ("spec_method", "spec_model", "spec_tokens"):
        if hasattr(stand_in, name):
            setattr(stand_in, name, None)
    try:
        speculative_config = original(stand_in, target_model_config, target_parallel_config)
    except Exception as error:  # pydantic, transformers and the hub client all raise their own types here
        raise ConfigError(f"{WHERE}: vLLM refused the drafter {inner.get('model')!r}: {_reason(error)}") from None
    if (
        target_model_config.enable_prompt_embeds
        and compat.placement().runner == "v1"
        and speculative_config.method not in ("ngram", "suffix")
    ):
        raise ConfigError(
            f"enable_prompt_embeds: True ends vLLM's engine at the first prompt of embeddings when a model drafts "
            f"({speculative_config.method}) on Model Runner V1; leave it out, or draft with ngram"
        )
    parser = getattr(engine_args, "reasoning_parser", None)
    per_request = getattr(engine_args, "per_request_spec_decode_metrics", "none") != "none"
    settings = settle_loaded(config, speculative_config, target_model_config, hub, parser)
    settings = dataclasses.replace(settings, per_request=per_request)
    replace_front_end()
    speculative_config.cospec = settings
    target_parallel_config.worker_cls = worker
    engine_args.scheduler_cls = SCHEDULER  # read when vLLM builds the scheduler's configuration, after this one
    _announce(settings)
    return speculative_config


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ").removeprefix(
            "Value error, "
        )
    return reason(error)


def _worker_class(parallel_config: Any) -> str:
    """Return the worker to run, after checking that arbitration can run there at all.

    Raises:
        CompatibilityError: a hook is missing, or the platform or runner is not supported.
    """
    place = compat.placement()
    if place.problem is not None:
        raise CompatibilityError(place.problem)
    if parallel_config.worker_cls not in ("auto", place.worker):
        raise CompatibilityError(
            f"worker_cls: {parallel_config.worker_cls!r} cannot be combined with cospec, which brings its own worker; "
            f"leave it out"
        )
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel_config, name)
        if size > 1:
            raise CompatibilityError(f"{name}: {size} is not supported with cospec; use 1")
    compat.require_hooks(place.scopes)
    if not compat.version_supported(compat.vllm_version()):
        logger.warning("cospec was not tested with vLLM %s; every hook it needs is there.", compat.vllm_version())
    return place.worker


def _announce(settings: Settings) -> None:
    line = settings.announcement()
    if line not in _announced:
        _announced.add(line)
        (logger.warning if settings.lossy else logger.info)(line)
