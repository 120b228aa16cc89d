"""Drafters that draft a block at once, on interpreted V2; random weights are enough."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from heads import random_parallel_head
from processes import DEMO, generate

pytestmark = pytest.mark.engine

PROMPTS = ["2+3*4?", "12+9-4*(7-2)+8*8+1?", "2+3*4-12+9?"]  # the last begins as the first
KEEP_SOME = {"method": "cospec", "arbiter": {"policy": "random", "rate": 0.6}}


def requests(strict: bool = False) -> list[dict[str, Any]]:
    """Greedy and seeded requests; the second goes on to the end of the context."""
    batch: list[dict[str, Any]] = [
        {"prompt": prompt, "temperature": 0.7 * (i == 2), "seed": i, "ignore_eos": True,
         "max_tokens": 60 if i == 1 else 12}
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    for request in batch if strict else ():
        request["extra_args"] = {"cospec_policy": "strict"}
    return batch


@pytest.mark.parametrize("method", ["dflash", pytest.param("dspark", marks=pytest.mark.slow)])  # three engines each
def test_drafts_of_parallel_drafters_are_arbitrated_whatever_runs_beside_them(method: str, tmp_path: Path) -> None:
    head = str(random_parallel_head(tmp_path / method, DEMO, dspark=method == "dspark"))
    settings: dict[str, Any] = {"max_model_len": 48, "block_size": 32}
    stock = generate(
        {"method": method, "model": head, "draft_sample_method": "probabilistic"}, [requests()], **settings
    )  # fmt: skip
    alone = [[request] for request in requests()]
    first = generate(
        KEEP_SOME | {"draft_method": method, "model": head},
        [*copy.deepcopy(alone), requests(strict=True)], enable_prefix_caching=False, **settings,
    )  # fmt: skip
    beside = generate(
        KEEP_SOME | {"draft_method": method, "model": head}, [requests(), requests()[::-1]], dummy_runs=True, **settings
    )
    *texts, strict = first["tokens"]
    assert strict == stock["tokens"][0]
    expected = [text for (text,) in texts]
    assert beside["tokens"][0] == expected
    assert beside["tokens"][1] == expected[::-1]
    assert expected != strict
    for run in (first, beside):
        *kept, mismatches = run["counters"]
        assert mismatches > sum(kept) > 10
        assert min(kept) > 0  # at every place of the block
        assert set(run["unhealthy"]) <= {"context"}
