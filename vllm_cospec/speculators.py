"""A checkpoint in the format of the speculators library as the model: a drafter that names its target."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cospec.config import DRAFT_METHODS, METHOD, WHERE, asked_for
from vllm_cospec.errors import ConfigError, shorten
from vllm_cospec.patches import sentence_alone


def make_maybe_override_with_speculators(original: Any) -> Any:
    """Return ``maybe_override_with_speculators``, which forgets what method was asked for, with a memory of ours.

    vLLM takes the target, the drafter and the method from the checkpoint; the drafter's method goes to
    ``draft_method``.
    """

    @functools.wraps(original)
    def maybe_override_with_speculators(model: str, *args: Any, **kwargs: Any) -> Any:
        target, tokenizer, config = original(model, *args, **kwargs)
        asked = kwargs.get("vllm_speculative_config")
        if not asked_for(asked) or asked_for(config):
            return target, tokenizer, config
        with sentence_alone():
            return target, tokenizer, _ask_for_us(model, config)

    return maybe_override_with_speculators


def _ask_for_us(checkpoint: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM made of a checkpoint and the user's keys as a configuration that asks for cospec."""
    method = config["method"]
    if method not in DRAFT_METHODS or config.get("parallel_drafting"):
        raise ConfigError(
            f"model: {checkpoint!r} is a speculators checkpoint whose drafter ({method}"
            f"{', drafting in parallel' if config.get('parallel_drafting') else ''}) cospec does not support; "
            f"serve it without cospec, or serve its target with another drafter"
        )
    ours = {key: value for key, value in config.items() if key.replace("-", "_") != "draft_method"}
    for key in config.keys() - ours.keys():
        if config[key] != method:
            raise ConfigError(
                f"{WHERE}.draft_method: {shorten(config[key])}, and the drafter of the speculators checkpoint "
                f"{checkpoint!r} is {method!r}; leave it out"
            )
    return {**ours, "method": METHOD, "draft_method": method}
