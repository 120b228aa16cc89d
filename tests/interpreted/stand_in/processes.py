"""Engines in processes of their own, on interpreted Model Runner V2 or, with the path for GPUs, on V1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import vllm_cospec.demo
from vllm_cospec import compat

DEMO = Path(vllm_cospec.demo.__file__).parent
OUTGROWS_DRAFT = (compat.vllm_version() or "").startswith("0.32")
"""Whether a request on V2 can be longer than the draft's context: from 0.33 on ``max_model_len`` is lowered to it."""


def generate(
    speculative_config: dict[str, Any], batches: list[list[dict[str, Any]]], v1: bool = False, **options: Any
) -> dict[str, Any]:
    """Run batches of requests through one engine, with the bundled pair and three drafts unless told otherwise.

    Args:
        speculative_config: as a user writes it.
        batches: lists of requests, as :mod:`engine` takes them.
        v1: on Model Runner V1.
        options: ``target`` in place of the bundled one, ``max_chunk_logits`` and ``dummy_runs``, see :mod:`engine`; the
            rest are the engine's.
    """
    request = {
        "target": str(options.pop("target", DEMO / "target")),
        "speculative_config": {"model": str(DEMO / "draft"), "num_speculative_tokens": 3, **speculative_config},
        "batches": batches,
        "v1_on_a_device": v1,
        "max_chunk_logits": options.pop("max_chunk_logits", 0),
        "dummy_runs": options.pop("dummy_runs", False),
        "options": options,
    }
    if speculative_config.get("draft_method") in ("ngram", "mtp"):
        del request["speculative_config"]["model"]
    here = Path(__file__).parent
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(here), str(here.parents[1] / "support")])
    environment = {
        **os.environ,
        **({"VLLM_USE_V2_MODEL_RUNNER": "0"} if v1 else {}),
        "PYTHONPATH": path,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    done = subprocess.run(
        [sys.executable, "-m", "engine", json.dumps(request)],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(results[0].removeprefix("RESULT"))
