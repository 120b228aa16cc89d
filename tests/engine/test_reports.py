"""What was done to each request stands beside vLLM's own figures of it, where it keeps them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_cospec.reports import request_metrics
from vllm_cospec.server import Server
from vllm_cospec.training.measure.demonstration import SERVER_ARGUMENTS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(request_metrics() is None, reason="this vLLM does not count per request"),
]

RunEngine = Callable[..., dict[str, Any]]
KEEP_HALF = {"policy": "random", "rate": 0.5}
SEVERAL = {"temperature": 0.7, "n": 3, "max_tokens": 40, "seed": 5}
STRICT = {"temperature": 0, "max_tokens": 40, "extra_args": {"cospec_policy": "strict"}}


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
    assert all((report["regret"] > 0) <= (report["num_overrides"] > 0) for report in own)
    assert sum(report["regret"] for report in own) > 1
    for choice in choices:
        assert len(choice["acceptance_histogram"]) == 6  # vLLM's, as without us
        assert choice["num_spec_steps"] == sum(choice["acceptance_histogram"])
    for (choice,) in result["runs"]["strict"]:
        assert choice["metrics"]["cospec"] == {"num_mismatches": 0, "num_overrides": 0, "regret": 0.0}
        assert choice["metrics"]["num_spec_steps"] > 0


def test_a_servers_answers_say_what_was_done_to_them(pair: Path, prompts: list[str], tmp_path: Path) -> None:
    arguments = (*SERVER_ARGUMENTS, "--per-request-spec-decode-metrics", "detailed")
    config = {"method": "cospec", "arbiter": KEEP_HALF}
    reports = []
    with Server(pair / "target", config, arguments, log=tmp_path / "server.log") as server:
        server.wait_until_ready()
        for prompt in prompts[:5]:
            answer = ask(server, {"prompt": prompt, "temperature": 0, "max_tokens": 60})
            speculative = answer["metrics"]["speculative_decoding"]
            assert len(speculative["per_step_accepted"]) == speculative["num_spec_steps"]
            reports.append(speculative["cospec"])
        counters = server.counters()
    assert sum(report["num_mismatches"] for report in reports) == counters["vllm:cospec_num_mismatches"]
    assert sum(report["num_overrides"] for report in reports) == counters["vllm:cospec_num_overrides"] > 0


def ask(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=240) as response:
        found: dict[str, Any] = json.load(response)
    return found
