"""Engines of one target that are alive at once and take turns on the same prompts, so that noise hits them alike."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import vllm_cospec.demo

BUNDLED = Path(vllm_cospec.demo.__file__).parent
MAX_TOKENS = 60

Name = TypeVar("Name")


def stock(draft: str, num_speculative_tokens: int) -> dict[str, Any]:
    """Return vLLM's own speculative decoding, which draws drafts as cospec does."""
    return {
        "method": "draft_model", "draft_sample_method": "probabilistic", "model": draft,
        "num_speculative_tokens": num_speculative_tokens,
    }  # fmt: skip


def cospec(draft: str, num_speculative_tokens: int, policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return cospec with a policy and the same drafts."""
    return {
        "method": "cospec", "arbiter": dict(policy), "model": draft, "num_speculative_tokens": num_speculative_tokens,
    }  # fmt: skip


def build_engines(target: str, methods: Mapping[str, dict[str, Any]], max_num_seqs: int) -> dict[str, Any]:
    """Return an LLM for each speculative configuration, by its name; one thread each unless it is said otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vllm import LLM

    return {
        name: LLM(
            target, dtype="float32", max_model_len=128, kv_cache_memory_bytes=2**28, enforce_eager=True,
            max_num_seqs=max_num_seqs, enable_prefix_caching=False, speculative_config=method,
        )
        for name, method in methods.items()
    }  # fmt: skip


def turns(names: Iterable[Name], number: int) -> list[Name]:
    """Return in which order engines take their turns in a round; every second one goes the other way."""
    return list(names)[:: 1 if number % 2 else -1]
