"""Draft health with heads that read the target's hidden states, on Model Runner V1; random weights are enough.

The policy keeps whatever is proposed, so that a head that has lost its place shows in the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from company import differing, mixed_requests
from heads import FAMILY, random_head, random_target

RunEngine = Callable[..., dict[str, Any]]
COUNT = 40
KEEP_ALL = {"method": "cospec", "arbiter": {"policy": "random", "rate": 1.0}, "num_speculative_tokens": 3}
ROOMY = {"enable_prefix_caching": False, "block_size": 32}
PRESSED = ROOMY | {
    "enable_chunked_prefill": True, "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 17,  # room for about four of sixteen sequences
}  # fmt: skip


def setting(method: str, directory: Path, pair: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The speculative configuration, and what the engine needs beside it."""
    if method == "mtp":
        return KEEP_ALL | {"draft_method": "mtp"}, {"model": str(random_target(directory / "mimo", pair))}
    head = random_head(directory / method, pair, eagle3=method == "eagle3")
    return KEEP_ALL | {"draft_method": method, "model": str(head)}, {}


def token_ids(outputs: list[list[dict[str, Any]]]) -> list[list[int]]:
    return [completions[0]["token_ids"] for completions in outputs]


@pytest.mark.engine
@pytest.mark.parametrize(
    "method", ["eagle", *(pytest.param(method, marks=pytest.mark.slow) for method in ("eagle3", "mtp"))]
)
def test_no_text_depends_on_the_company(method: str, pair: Path, run_engine: RunEngine, tmp_path: Path) -> None:
    """Prompts in chunks, late blocks, preemptions: what a head is fed with each token is the token behind it."""
    speculative, engine = setting(method, tmp_path, pair)
    requests = mixed_requests(COUNT, seed=21, max_tokens=30, grammar=False)
    order = list(range(COUNT))
    random.Random(3).shuffle(order)

    def run(indices: list[int], **more: Any) -> dict[str, Any]:
        prompts, params = zip(*(requests[i] for i in indices), strict=True)
        return {"name": "run", "prompts": list(prompts), "params": list(params), **more}

    alone = run_engine([run(list(range(COUNT)), one_at_a_time=True)], speculative, **ROOMY, **engine)
    pressed = run_engine([run(order)], speculative, **PRESSED, **engine)
    expected, found = token_ids(alone["runs"]["run"]), token_ids(pressed["runs"]["run"])
    assert differing(expected, found, order) == []
    assert pressed["metrics"]["vllm:num_preemptions"] > 0
    assert alone["metrics"]["vllm:cospec_num_overrides"] > COUNT
    for name in ("num_mismatches", "num_overrides", "num_unhealthy"):
        assert pressed["metrics"][f"vllm:cospec_{name}"] == alone["metrics"][f"vllm:cospec_{name}"], name


@pytest.mark.engine
def test_a_prefix_whose_last_entry_belongs_to_another_text_is_computed_again(
    pair: Path, run_engine: RunEngine, tmp_path: Path
) -> None:
    """vLLM leaves out the last block of a hit, unless told otherwise; those before it may be another text's, too."""
    speculative, engine = setting("eagle", tmp_path, pair)
    params = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    run = {"name": "run", "prompts": [*FAMILY, FAMILY[0]], "params": params, "one_at_a_time": True}
    alone = run_engine([run], speculative, **ROOMY, **engine)
    for keep_the_last_block in (False, True):
        settings = speculative | {"disable_eagle_block_drop": keep_the_last_block}
        found = run_engine([run], settings, **ROOMY | {"enable_prefix_caching": True}, **engine)
        assert token_ids(found["runs"]["run"]) == token_ids(alone["runs"]["run"]), keep_the_last_block
        assert found["metrics"]["vllm:prefix_cache_hits"] > 0
        assert found["metrics"]["vllm:cospec_num_unhealthy"] == 0
