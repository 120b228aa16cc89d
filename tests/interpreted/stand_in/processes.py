"""Engines in processes of their own, on interpreted Model Runner V2 or, with the path for GPUs, on V1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
from engines import IMPORTED, forked

import vllm_cospec.demo
from vllm_cospec import compat

DEMO = Path(vllm_cospec.demo.__file__).parent
OUTGROWS_DRAFT = (compat.vllm_version() or "").startswith("0.32")
"""Whether a request on V2 can be longer than the draft's context: from 0.33 on ``max_model_len`` is lowered to it."""
RUNNERS = [
    "vllm.v1.worker.cpu.model_runner", "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
    "vllm_cospec.runners.v2", "vllm_cospec.runners.v1_gpu", "engine",
]  # fmt: skip


def in_a_fork(function: Callable[[Any], dict[str, Any]], job: Any) -> dict[str, Any]:
    """Call a function in a fork of a process that has imported what engines need.

    Not of the tests' own: with that imported, PyTorch's meta tensors take no companion on another device.
    """
    return forked(function, job, [*IMPORTED, *RUNNERS])


def generate(
    speculative_config: dict[str, Any], batches: list[list[dict[str, Any]]], v1: bool = False, **options: Any
) -> dict[str, Any]:
    """Run batches of requests through one engine, with the bundled pair and three drafts unless told otherwise.

    Args:
        speculative_config: as a user writes it.
        batches: lists of requests, as :mod:`engine` takes them.
        v1: on Model Runner V1.
        options: ``target`` in place of the bundled one, ``max_chunk_logits``, ``dummy_runs`` and ``between_steps``, see
            :mod:`engine`; the rest are the engine's.
    """
    request = {
        "target": str(options.pop("target", DEMO / "target")),
        "speculative_config": {"model": str(DEMO / "draft"), "num_speculative_tokens": 3, **speculative_config},
        "batches": batches,
        "v1_on_a_device": v1,
        "max_chunk_logits": options.pop("max_chunk_logits", 0),
        "dummy_runs": options.pop("dummy_runs", False),
        "between_steps": options.pop("between_steps", {}),
        "options": options,
    }
    if speculative_config.get("draft_method") in ("ngram", "mtp"):
        del request["speculative_config"]["model"]
    return in_a_fork(engine.main, request)
