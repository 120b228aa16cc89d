"""What a KV connector brings without the drafter having seen it, or does not bring, on Model Runner V1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunEngine = Callable[..., dict[str, Any]]
GREEDY = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
STRICT = {"extra_args": {"cospec_policy": "strict"}}
REPEATING = "12+34?" * 11  # two blocks and a few tokens; there is something to draft behind the first token
PROMPT = "+".join(str(n) for n in range(1, 30)) + "?"  # two blocks of the KV cache, and 16 tokens


@pytest.mark.engine
def test_a_prefix_that_came_without_the_drafts_layers_makes_a_request_strict(
    pair: Path, run_engine: RunEngine, tmp_path: Path
) -> None:
    result = run_engine(
        [
            {"name": "first", "prompts": [PROMPT], "params": GREEDY},
            # Freed blocks are handed out backwards. This one fills two, and has a third that is full from before.
            {"name": "between", "prompts": ["(17-2)*3+4?"], "params": GREEDY | {"max_tokens": 1 + 64 - 12}},
            {"name": "loaded", "prompts": [PROMPT], "params": GREEDY},
            {"name": "strict", "prompts": [PROMPT], "params": GREEDY | STRICT},
        ],
        {
            "method": "cospec", "model": str(pair / "draft"), "num_speculative_tokens": 3,
            "arbiter": {"policy": "random", "rate": 1.0},
        },
        block_size=32,
        enable_prefix_caching=False,
        num_gpu_blocks_override=5,  # room for one: the third stands on blocks that the drafter has filled for others
        kv_transfer_config={
            "kv_connector": "HalfConnector", "kv_connector_module_path": "half_connector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    )  # fmt: skip
    first, _, loaded, strict = ([c["token_ids"] for c in completions] for (completions,) in result["runs"].values())
    assert loaded == strict != first
    assert result["metrics"]["vllm:cospec_num_unhealthy"] == result["metrics"]["vllm:cospec_num_unhealthy[cache]"] >= 19


@pytest.mark.engine
def test_drafts_behind_a_token_that_is_taken_back_are_not_verified(
    pair: Path, run_engine: RunEngine, tmp_path: Path
) -> None:
    """What a connector could not load is computed again; vLLM keeps what was drafted behind the token sampled first."""
    params = GREEDY | {"max_tokens": 40}
    result = run_engine(
        [{"name": name, "prompts": [REPEATING], "params": params} for name in ("first", "failed")],
        {
            "method": "cospec", "draft_method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1,
            "prompt_lookup_max": 4, "arbiter": {"policy": "random", "rate": 1.0},
        },
        block_size=32,
        enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "FailingConnector", "kv_connector_module_path": "failing_connector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
            "kv_load_failure_policy": "recompute",
        },
    )  # fmt: skip
    first, failed = (completions[0]["token_ids"] for (completions,) in result["runs"].values())
    assert failed == first
    assert result["metrics"]["vllm:cospec_num_overrides"] > 0
