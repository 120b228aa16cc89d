"""Settling: the user's keys, checked against the models vLLM was given, become the settings a worker gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_cospec.config import DRAFT_METHODS, WHERE, CoSpecConfig, Settings
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Policy


def settle_loaded(config: CoSpecConfig, speculative_config: Any, target_model_config: Any) -> Settings:
    """Check a configuration against the models vLLM was given; see :func:`settle`.

    Args:
        config: from :func:`vllm_cospec.translate.resolve`.
        speculative_config: vLLM's SpeculativeConfig of the inner drafter.
        target_model_config: vLLM's ModelConfig of the target.

    Raises:
        ConfigError, ArtefactError: one sentence.
    """
    from vllm_cospec.metrics import counters_directory

    def vocabulary() -> dict[str, int]:
        from vllm.tokenizers.registry import get_tokenizer

        return get_tokenizer(
            target_model_config.tokenizer,
            tokenizer_mode=target_model_config.tokenizer_mode,
            trust_remote_code=target_model_config.trust_remote_code,
            revision=target_model_config.tokenizer_revision,
        ).get_vocab()

    if speculative_config.parallel_drafting:
        raise ConfigError(f"{WHERE}.model: drafts in parallel, which cospec does not support; use another drafter")
    return settle(
        config,
        method=speculative_config.method,
        num_speculative_tokens=speculative_config.num_speculative_tokens,
        target_vocab_size=target_model_config.get_vocab_size(),
        draft_vocab_size=speculative_config.draft_model_config.get_vocab_size()
        if speculative_config.method == "draft_model"
        else 0,
        target_vocabulary=vocabulary,
        counters=counters_directory(),
    )


def settle(
    config: CoSpecConfig,
    method: str,
    num_speculative_tokens: int,
    target_vocab_size: int,
    draft_vocab_size: int,
    target_vocabulary: Any,
    counters: str,
) -> Settings:
    """Check a configuration against what vLLM made of it.

    Args:
        config: from :func:`vllm_cospec.translate.resolve`; ``arbiter`` is a policy.
        method: the inner method vLLM settled on.
        num_speculative_tokens: K.
        target_vocab_size, draft_vocab_size: as the models' configurations say.
        target_vocabulary: called without arguments, returns the target tokenizer's dict of token to id.
        counters: directory for the counters.

    Raises:
        ConfigError, ArtefactError: one sentence.
    """
    policy = config.arbiter
    assert isinstance(policy, Policy)
    if method not in DRAFT_METHODS:
        raise ConfigError(
            f"{WHERE}.draft_method: vLLM detected {method!r}, which arbitration does not support; "
            f"choose a drafter of kind {', '.join(DRAFT_METHODS)}"
        )
    draft_logits = DRAFT_METHODS[method]
    if method == "draft_model" and draft_vocab_size != target_vocab_size:
        raise ConfigError(
            f"{WHERE}.model: the draft has a vocabulary of {draft_vocab_size} tokens, the target of "
            f"{target_vocab_size}; use a draft with the target's tokenizer"
        )
    if policy.needs_draft_logits and not draft_logits:
        raise ConfigError(
            f"{WHERE}.arbiter: policy {policy.policy!r} needs draft logits, and drafter {method!r} has none"
        )
    threshold = 0.5
    try:
        policy = policy.for_block_length(num_speculative_tokens)
    except ValueError as error:
        raise ConfigError(f"{WHERE}.arbiter.{error}") from None
    if policy.arbiter is not None:
        threshold = _settle_learned(config, policy.arbiter, draft_logits, target_vocab_size, target_vocabulary)
    elif config.threshold is not None or config.max_accuracy_loss is not None:
        raise ConfigError(f"{WHERE}.threshold: is for a trained arbiter, not for policy {policy.policy!r}; remove it")
    return Settings(
        policy=policy,
        threshold=threshold,
        max_overrides=config.max_overrides,
        exact_tokens=config.exact_tokens,
        collect=config.collect,
        draft_logits=draft_logits,
        num_speculative_tokens=num_speculative_tokens,
        counters=counters,
    )


def _settle_learned(config: CoSpecConfig, arbiter: str, draft_logits: bool, vocab_size: int, vocabulary: Any) -> float:
    from vllm_cospec.arbiter import calibrated_threshold, check_fit, load_artefact, tokenizer_hash

    _, artefact = load_artefact(Path(arbiter))
    check_fit(artefact, arbiter, draft_logits, vocab_size, tokenizer_hash(vocabulary()))
    if config.max_accuracy_loss is not None:
        return calibrated_threshold(artefact, arbiter, config.max_accuracy_loss)
    return artefact.threshold if config.threshold is None else config.threshold
