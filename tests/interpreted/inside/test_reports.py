"""What was done to each request, counted on the device, for both runners."""

from __future__ import annotations

from collections import Counter

import pytest
from processes import generate

from vllm_cospec.reports import request_metrics

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(request_metrics() is None, reason="this vLLM does not count per request"),
]

PROMPTS = ["2+3*4?", "(7-2)*3?", "12+9-4?", "8*8+1?"]


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
def test_every_request_says_what_was_done_to_it(v1: bool) -> None:
    batch = [{"prompt": prompt, "temperature": 0.0, "max_tokens": 10, "ignore_eos": True} for prompt in PROMPTS]
    batch[3]["extra_args"] = {"cospec_policy": "strict"}
    result = generate(
        {"method": "cospec", "arbiter": {"policy": "random", "rate": 0.6}, "collect": True}, [batch], v1=v1,
        per_request_spec_decode_metrics="summary",
    )  # fmt: skip
    reports = [report["cospec"] for report in result["reports"][0]]
    kept = Counter(int(d["request"].split("-")[0]) for d in result["decisions"] if d["kept"])
    assert [report["num_overrides"] for report in reports] == [kept[i] for i in range(4)]
    assert sum(kept.values()) > 3
    *per_position, mismatches = result["counters"]
    assert sum(report["num_mismatches"] for report in reports) == mismatches > sum(per_position)
    assert all((report["regret"] > 0) <= (report["num_overrides"] > 0) for report in reports)
    assert sum(report["regret"] for report in reports) > 0.1
    assert reports[3] == {"num_mismatches": 0, "num_overrides": 0, "regret": 0.0}
