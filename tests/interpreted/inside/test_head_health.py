"""Draft health with heads that read the target's hidden states, on interpreted V2; random weights are enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from company import mixed_requests
from heads import FAMILY, random_head, random_target
from processes import DEMO, generate

pytestmark = pytest.mark.engine

KEEP_ALL = {"method": "cospec", "arbiter": {"policy": "random", "rate": 1.0}}
COUNT = 10
PRESSED: dict[str, Any] = {
    "block_size": 32, "max_num_seqs": 6, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 9
}  # fmt: skip


@pytest.mark.parametrize(
    "method", ["eagle", *(pytest.param(method, marks=pytest.mark.slow) for method in ("eagle3", "mtp"))]
)
def test_requests_in_company_get_the_texts_they_get_alone(method: str, tmp_path: Path) -> None:
    """Prompts in chunks, late blocks, preemptions and cache hits, beside requests of every kind and long ones."""
    engine: dict[str, Any] = {}
    speculative = KEEP_ALL | {"draft_method": method, "collect": True}
    if method == "mtp":
        engine["target"] = random_target(tmp_path / "mimo", DEMO)
    else:
        speculative["model"] = str(random_head(tmp_path / method, DEMO, eagle3=method == "eagle3"))
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, **params} for prompt, params in mixed_requests(COUNT, seed=8, max_tokens=20, grammar=False)
    ]
    roomy = engine | {"block_size": 32, "enable_prefix_caching": False}
    alone = generate(speculative, [[entry] for entry in entries], **roomy)
    company = generate(speculative, [entries], **engine, **PRESSED)
    assert company["tokens"] == [[texts[0] for texts in alone["tokens"]]]
    assert company["metrics"]["vllm:num_preemptions"] > 0
    assert sum(decision["kept"] for decision in alone["decisions"]) > COUNT
    assert company["counters"] == alone["counters"]  # the same decisions
    assert company["unhealthy"] == {}


def test_a_prefix_whose_last_entry_belongs_to_another_text_is_computed_again(tmp_path: Path) -> None:
    head = random_head(tmp_path / "eagle", DEMO, eagle3=False)
    batches = [
        [{"prompt": prompt, "temperature": 0.0, "max_tokens": 12, "ignore_eos": True}]
        for prompt in (FAMILY[i] for i in (0, 1, 6, 0))  # of the third the foreign entry would change the text
    ]
    speculative = KEEP_ALL | {"draft_method": "eagle", "model": str(head)}
    alone = generate(speculative, batches, block_size=32, enable_prefix_caching=False)
    for keep_the_last_block in (False, True):
        found = generate(speculative | {"disable_eagle_block_drop": keep_the_last_block}, batches, block_size=32)
        assert found["tokens"] == alone["tokens"], keep_the_last_block
        assert found["metrics"]["vllm:prefix_cache_hits"] > 0
        assert found["unhealthy"] == {}


def test_seeded_requests_repeat_themselves() -> None:
    """Two runs of one server, the second in another order and beside others; arbitrated and strict."""
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, "temperature": 0.8, "seed": 10 * i + strict, "max_tokens": 16, "ignore_eos": True}
        | ({"extra_args": {"cospec_policy": "strict"}} if strict else {})
        for strict in (False, True)
        for i, prompt in enumerate(["2+3*4?", "(7-2)*3?", "12+9-4?", "8*8+1?"])
    ]
    neighbours: list[dict[str, Any]] = [{"prompt": "384-14*2-146?", "temperature": 1.0, "max_tokens": 16}] * 2
    run = generate(
        {"method": "cospec", "arbiter": {"policy": "random", "rate": 0.5}},
        [entries, [*neighbours, *reversed(entries)]],
        max_num_seqs=6,
    )
    first, second = run["tokens"]
    assert second[2:][::-1] == first
    assert len({tuple(tokens) for tokens in first}) == len(entries)
    assert sum(run["counters"][:-1]) > 0
