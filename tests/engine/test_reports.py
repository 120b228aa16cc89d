"""What was done to each request stands beside vLLM's own figures of it, where it keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunEngine = Callable[..., dict[str, Any]]
KEEP_HALF = {"policy": "random", "rate": 0.5}
SEVERAL = {"temperature": 0.7, "n": 3, "max_tokens": 40, "seed": 5}
STRICT = {"temperature": 0, "max_tokens": 40, "extra_args": {"cospec_policy": "strict"}}


@pytest.mark.engine
def test_every_choice_says_what_was_done_to_it(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    runs = [
        {"name": "several", "prompts": prompts[:10], "params": SEVERAL},
        {"name": "strict", "prompts": prompts[:10], "params": STRICT},
    ]
    settings = {
        "method": "cospec", "model": str(pair / "draft"), "num_speculative_tokens": 5, "arbiter": KEEP_HALF,
        "collect": True,
    }  # fmt: skip
    result = run_engine(
        runs, settings, per_request_spec_decode_metrics="summary",
        kv_cache_memory_bytes=3 * 2**20, block_size=32,  # some are preempted, and keep their counts
    )  # fmt: skip
    assert result["metrics"]["vllm:num_preemptions"] > 0
    choices = [choice["metrics"] for choices in result["runs"]["several"] for choice in choices]
    assert len(choices) == 30
    own = [choice["cospec"] for choice in choices]
    kept: dict[str, int] = {}
    for decision in result["decisions"]:
        request = decision["request_id"]
        kept[request] = kept.get(request, 0) + decision["kept"]
    assert sorted(report["num_overrides"] for report in own if report["num_overrides"]) == sorted(
        count for count in kept.values() if count
    )
    assert len({report["num_overrides"] for report in own}) > 3
    assert sum(report["num_mismatches"] for report in own) == result["metrics"]["vllm:cospec_num_mismatches"]
    assert sum(report["num_overrides"] for report in own) == result["metrics"]["vllm:cospec_num_overrides"]
    responses = "vllm:cospec_overrides_per_response"  # of those that were arbitrated
    assert result["metrics"][f"{responses}_count"] == 30
    assert result["metrics"][f"{responses}_sum"] == result["metrics"]["vllm:cospec_num_overrides"]
    assert "vllm:cospec_score_count" not in result["metrics"]
    assert all((report["regret"] > 0) <= (report["num_overrides"] > 0) for report in own)
    assert sum(report["regret"] for report in own) > 1
    for choice in choices:
        assert len(choice["acceptance_histogram"]) == 6  # vLLM's, as without us
        assert choice["num_spec_steps"] == sum(choice["acceptance_histogram"])
    for (choice,) in result["runs"]["strict"]:
        assert choice["metrics"]["cospec"] == {"num_mismatches": 0, "num_overrides": 0, "regret": 0.0}
        assert choice["metrics"]["num_spec_steps"] > 0


@pytest.mark.engine
def test_scores_are_counted_where_nothing_is_watched(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    greedy = {"temperature": 0, "max_tokens": 40}
    runs = [{"name": "run", "prompts": prompts[:20], "params": greedy},
            {"name": "strict", "prompts": prompts[:3], "params": STRICT}]  # fmt: skip
    settings = {
        "method": "cospec", "model": str(pair / "draft"), "num_speculative_tokens": 5, "arbiter": str(pair / "arbiter"),
        "threshold": 0.4,
    }  # fmt: skip
    metrics = run_engine(runs, settings, per_request_spec_decode_metrics="summary")["metrics"]
    assert metrics["vllm:cospec_overrides_per_response_count"] == 20
    assert metrics["vllm:cospec_overrides_per_response_sum"] == metrics["vllm:cospec_num_overrides"] > 0
    assert metrics["vllm:cospec_score_count"] == metrics["vllm:cospec_num_mismatches"]
    assert "vllm:cospec_num_drift_alarms" not in metrics
