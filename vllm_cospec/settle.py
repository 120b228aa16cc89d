"""Settling: the user's keys, checked against the models vLLM was given, become the settings a worker gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_cospec import compat, tokenizers
from vllm_cospec.calibration import STRICT_THRESHOLD, Conditions, calibrated_threshold, differences
from vllm_cospec.config import DRAFT_METHODS, WHERE, Calibrated, CoSpecConfig, Settings
from vllm_cospec.drift import Traffic
from vllm_cospec.errors import ConfigError, reason
from vllm_cospec.fingerprint import template_hash, weights_hash
from vllm_cospec.kernels.policies import Policy
from vllm_cospec.recipe import Hub
from vllm_cospec.scope import UNKNOWN, thinking_tokens

if TYPE_CHECKING:
    from vllm_cospec.arbiter import ArtefactConfig

logger = init_logger("vllm.cospec")

OWN_WEIGHTS = ("draft_model", "eagle", "eagle3", "dflash", "dspark")
"""Methods whose drafter is a model of its own, not a part of the target or none at all."""
PARALLEL = ("dflash", "dspark")
"""Methods that draft a block at once and are supported, on Model Runner V2."""


@dataclass(frozen=True)
class Models:
    """What vLLM made of the two models."""

    method: str
    """The inner method it settled on."""
    num_speculative_tokens: int
    target_vocab_size: int
    draft_vocab_size: int
    """As the configurations say, padding included."""
    target_context: int
    draft_context: int
    """Tokens the models are served with."""
    target_tokenizer: Callable[[], Any]
    draft_tokenizer: Callable[[], Any]
    """Load the tokenizers; raise whatever the libraries raise when there is none."""
    dtype: str
    """Of the target, for example bfloat16."""
    draft_weights: Callable[[], str]
    """Return the hash of the draft's weights, see :func:`vllm_cospec.fingerprint.weights_hash`."""
    reasoning_parser: str | None = None
    """Name of vLLM's."""

    def conditions(self, tokenizer: Any) -> Conditions:
        """Return what is served, to be compared with what was calibrated; sampling is a request's to say."""
        return Conditions(
            draft=self.draft_weights(),
            num_speculative_tokens=self.num_speculative_tokens,
            dtype=self.dtype,
            chat_template=template_hash(getattr(tokenizer, "chat_template", None)),
            temperature=(0.0, 0.0),
            top_p=(1.0, 1.0),
        )


def settle_loaded(
    config: CoSpecConfig, speculative_config: Any, target_model_config: Any, hub: Hub, reasoning_parser: str | None
) -> Settings:
    """Check a configuration against the models vLLM was given; see :func:`settle`.

    Args:
        config: from :func:`vllm_cospec.translate.resolve`.
        speculative_config: vLLM's SpeculativeConfig of the inner drafter.
        target_model_config: vLLM's ModelConfig of the target.
        hub: how vLLM reaches the hub.
        reasoning_parser: name of vLLM's, None or empty for none.

    Raises:
        ConfigError, ArtefactError: one sentence.
    """
    from vllm_cospec.metrics import counters_directory

    if speculative_config.parallel_drafting:
        _check_parallel(speculative_config.method)
    _check_modules(speculative_config)
    target, draft = target_model_config, speculative_config.draft_model_config or target_model_config
    models = Models(
        method=speculative_config.method,
        num_speculative_tokens=speculative_config.num_speculative_tokens,
        target_vocab_size=target.get_vocab_size(),
        draft_vocab_size=draft.get_vocab_size(),
        target_context=target.max_model_len,
        draft_context=draft.max_model_len,
        target_tokenizer=functools.partial(_tokenizer, target, target.tokenizer, target.tokenizer_revision, hub),
        draft_tokenizer=functools.partial(_tokenizer, target, draft.model, draft.revision, hub),
        dtype=str(target.dtype).removeprefix("torch."),
        draft_weights=functools.partial(
            weights_hash,
            draft.model if speculative_config.method in OWN_WEIGHTS else None,
            revision=draft.revision,
            cache_dir=hub.cache_dir,
        ),
        reasoning_parser=reasoning_parser,
    )
    return settle(config, models, counters_directory())


def _check_parallel(method: str) -> None:
    """Refuse drafters that draft a block at once where nothing follows what their cache holds."""
    if method not in PARALLEL:
        raise ConfigError(
            f"{WHERE}.model: a {method!r} head that drafts in parallel runs on Model Runner V1 alone, where cospec "
            f"does not follow what such a drafter's cache holds; use another drafter"
        )
    if compat.placement().runner == "v1":
        raise ConfigError(
            f"{WHERE}.draft_method: {method!r} drafts in parallel, and on Model Runner V1 cospec does not follow what "
            f"such a drafter's cache holds; serve on Model Runner V2, or use another drafter"
        )


def _check_modules(speculative_config: Any) -> None:
    """Refuse heads of several modules, each with a cache of its own: nothing here follows the later ones."""
    only_one = "pass 1"
    if compat.placement().runner == "v2":
        several = speculative_config.use_multi_module_mtp()
    else:
        several, only_one = speculative_config.use_step3p5_mtp(), "use another drafter"
    if several:
        raise ConfigError(
            f"{WHERE}.num_speculative_tokens: {speculative_config.num_speculative_tokens} needs several modules of "
            f"this model's MTP head, and cospec follows the cache of the first alone; {only_one}"
        )


def _tokenizer(target: Any, name: str, revision: str | None, hub: Hub) -> Any:
    from vllm.tokenizers.registry import get_tokenizer

    options: dict[str, Any] = {} if hub.token is None else {"token": hub.token}
    return get_tokenizer(
        name,
        tokenizer_mode=target.tokenizer_mode,
        trust_remote_code=target.trust_remote_code,
        revision=revision,
        download_dir=hub.cache_dir,
        **options,
    )


def settle(config: CoSpecConfig, models: Models, counters: str) -> Settings:
    """Check a configuration against what vLLM made of the models; warn of what can be served but will disappoint.

    Args:
        config: from :func:`vllm_cospec.translate.resolve`; ``arbiter`` is a policy.
        models: the pair.
        counters: directory for the counters.

    Raises:
        ConfigError, ArtefactError: one sentence.
    """
    policy = config.arbiter
    assert isinstance(policy, Policy)
    method, k = models.method, models.num_speculative_tokens
    if method not in DRAFT_METHODS:
        raise ConfigError(
            f"{WHERE}.draft_method: vLLM detected {method!r}, which arbitration does not support; "
            f"choose a drafter of kind {', '.join(DRAFT_METHODS)}"
        )
    if policy.needs_draft_logits and not DRAFT_METHODS[method]:
        raise ConfigError(
            f"{WHERE}.arbiter: policy {policy.policy!r} needs draft logits, and drafter {method!r} has none"
        )
    if method == "draft_model":
        _check_sizes(models)
        if policy.policy != "strict":  # which rejects what it does not know
            _check_tokens(models)
    _check_contexts(models)
    threshold, calibrated, traffic = 0.5, Calibrated(), None
    try:
        policy = policy.for_block_length(k)
    except ValueError as error:
        raise ConfigError(f"{WHERE}.arbiter.{error}") from None
    if policy.arbiter is not None:
        threshold, calibrated, traffic = _settle_learned(config, policy.arbiter, models)
    elif config.threshold is not None or config.max_accuracy_loss is not None:
        raise ConfigError(f"{WHERE}.threshold: is for a trained arbiter, not for policy {policy.policy!r}; remove it")
    return Settings(
        policy=policy,
        threshold=threshold,
        max_overrides=config.max_overrides,
        max_regret=config.max_regret,
        request_settings=config.request_settings,
        scope=config.scope,
        thinking_tokens=_settle_scope(config, models),
        exact_tokens=config.exact_tokens,
        collect=config.collect,
        draft_logits=DRAFT_METHODS[method],
        num_speculative_tokens=k,
        counters=counters,
        calibrated=calibrated,
        traffic=traffic,
        on_drift=config.on_drift,
        drift_pause=config.drift_pause,
    )


def _settle_scope(config: CoSpecConfig, models: Models) -> tuple[int, int] | None:
    """Return the tokens between which the model thinks, as far as they are known and matter."""
    if config.scope == "all" and "scope" not in config.request_settings:
        return None
    try:
        found = thinking_tokens(config.thinking_tokens, models.reasoning_parser, models.target_tokenizer)
    except ConfigError:
        if config.scope != "all":
            raise
        found = None  # a request that asks for a scope is refused
    if found is None and config.scope != "all":
        raise ConfigError(f"{WHERE}.scope: {config.scope!r} {UNKNOWN}")
    if found is not None and max(found) >= models.target_vocab_size:
        raise ConfigError(
            f"{WHERE}.thinking_tokens: {max(found)} is no token of the target's {models.target_vocab_size}; pass ids "
            f"of its vocabulary"
        )
    return found


def _check_sizes(models: Models) -> None:
    """Refuse a draft whose rows of logits are not as long as the target's."""
    if models.draft_vocab_size != models.target_vocab_size:
        raise ConfigError(
            f"{WHERE}.model: the draft has a vocabulary of {models.draft_vocab_size} tokens, the target of "
            f"{models.target_vocab_size}; use a draft with the target's tokenizer"
        )


def _check_tokens(models: Models) -> None:
    """Refuse a draft that means something else by its tokens; warn where it knows fewer, or they cannot be compared."""
    try:
        target, draft = models.target_tokenizer(), models.draft_tokenizer()
    except Exception as error:  # each library has its own
        logger.warning_once(
            "%s.model: whether the draft's tokens are the target's was not checked, since a tokenizer is missing (%s); "
            "put the target's tokenizer files beside the draft.", WHERE, reason(error, 200),
        )  # fmt: skip
        return
    known, proposed = target.get_vocab(), draft.get_vocab()
    if difference := tokenizers.only_in(proposed, known):
        other = "nothing" if difference.other is None else repr(difference.other)
        raise ConfigError(
            f"{WHERE}.model: the draft's tokenizer has {difference.token!r} under id {difference.token_id}, where the "
            f"target's has {other}; use a draft with the target's tokenizer"
        )
    if difference := tokenizers.only_in(known, proposed):
        logger.warning_once(
            "%s.model: the draft's tokenizer lacks %r (id %d) of the target's; it cannot draft that token, and what "
            "it drafts after it is a guess.", WHERE, difference.token, difference.token_id,
        )  # fmt: skip
    elif not tokenizers.same_split(target, draft):
        logger.warning_once(
            "%s.model: the draft's tokenizer has the target's tokens and splits text otherwise; prompts will look "
            "strange to the draft, and it will draft worse.", WHERE,
        )  # fmt: skip


def _check_contexts(models: Models) -> None:
    if models.draft_context < models.target_context:
        logger.warning_once(
            "%s.max_model_len: the draft's context of %d tokens is shorter than the target's of %d; a request that "
            "outgrows it is verified strictly from there on. Use a draft with a longer context, or serve with "
            "--max-model-len %d.", WHERE, models.draft_context, models.target_context, models.draft_context,
        )  # fmt: skip


def _settle_learned(config: CoSpecConfig, arbiter: str, models: Models) -> tuple[float, Calibrated, Traffic | None]:
    """Return the threshold of a trained arbiter, what its calibration says about what is served, and what it saw."""
    from vllm_cospec.arbiter import check_fit, load_artefact, tokenizer_hash

    _, artefact = load_artefact(Path(arbiter))
    try:
        tokenizer = models.target_tokenizer()
        vocabulary = tokenizer.get_vocab()
    except Exception as error:  # each library has its own
        raise ConfigError(
            f"tokenizer: the target's cannot be loaded ({reason(error, 200)}), and a trained arbiter is checked "
            f"against it; pass tokenizer, or choose a rule"
        ) from None
    check_fit(artefact, arbiter, DRAFT_METHODS[models.method], tokenizer_hash(vocabulary))
    threshold = artefact.threshold if config.threshold is None else config.threshold
    if config.max_accuracy_loss is not None:
        threshold = calibrated_threshold(artefact.calibration, arbiter, config.max_accuracy_loss)
    refuse = config.on_mismatch == "refuse" or config.max_accuracy_loss is not None
    conditions = artefact.statement.conditions if artefact.statement else None
    found = (
        ["it does not say for what"] if conditions is None else differences(conditions, models.conditions(tokenizer))
    )
    if refuse and found:
        key = "on_mismatch" if config.max_accuracy_loss is None else "max_accuracy_loss"
        raise ConfigError(
            f"{WHERE}.{key}: {arbiter} was not calibrated for what is served ({'; '.join(found)}); run `cospec "
            f"calibrate` for it, or pass threshold and leave {key} out"
        )
    if threshold >= STRICT_THRESHOLD:
        refuse = False  # nothing is kept, so there is nothing to be kept to
    calibrated = Calibrated(conditions, refuse, tuple(found) if conditions is not None else ())
    return threshold, calibrated, _traffic(config, artefact, arbiter, threshold)


def _traffic(config: CoSpecConfig, artefact: ArtefactConfig, arbiter: str, threshold: float) -> Traffic | None:
    """Return what calibration saw of requests, where it saw them with the settings that are served."""
    limits = (config.max_overrides, config.max_regret, config.exact_tokens or None, config.scope)
    as_calibrated = threshold == artefact.threshold and limits == (None, None, None, "all")
    traffic = artefact.statement.traffic if artefact.statement is not None and as_calibrated else None
    if traffic is None and config.on_drift == "strict":
        raise ConfigError(
            f"{WHERE}.on_drift: 'strict' needs what calibration saw of requests at the settings that are served, and "
            f"{arbiter} has it at most for its own threshold without limits; leave on_drift out, or calibrate again"
        )
    return traffic
