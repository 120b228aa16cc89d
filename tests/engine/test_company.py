"""A request's text is a function of the request and the server's settings, not of what runs beside it.

float32 throughout: in bfloat16 near-ties flip with the composition of a batch, in stock vLLM as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from company import SHARED, differing, mixed_requests, short_draft

RunEngine = Callable[..., dict[str, Any]]
GREEDY = {"temperature": 0, "max_tokens": 60}
STRICT = {"extra_args": {"cospec_policy": "strict"}}
LEARNED = {"method": "cospec"}
KEEP_ALL = {"method": "cospec", "arbiter": {"policy": "cascade", "alpha": 1.0}}
NGRAM = {"draft_method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
ROOMY = {"enable_prefix_caching": False, "block_size": 32}
PRESSED = {
    "enable_prefix_caching": True, "block_size": 32, "enable_chunked_prefill": True, "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 3 * 2**20,  # room for about four of sixteen sequences
}  # fmt: skip

UNREST = {"reset": 25, "pause": 10, "idle": 3, "guests": 6}  # see engines.interrupted


def job(name: str, requests: list[Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "prompts": [p for p, _ in requests], "params": [params for _, params in requests], **more}


def token_ids(outputs: list[list[dict[str, Any]]]) -> list[list[int]]:
    return [completions[0]["token_ids"] for completions in outputs]


def shuffled(n: int, seed: int) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("n", "seeds", "speculative_config"),
    [
        pytest.param(60, (1,), LEARNED, id="learned"),
        pytest.param(500, (1, 2, 3), LEARNED, id="learned, large", marks=pytest.mark.slow),
        pytest.param(60, (1,), KEEP_ALL, id="rule", marks=pytest.mark.slow),
        pytest.param(60, (1,), KEEP_ALL | NGRAM, id="ngram", marks=pytest.mark.slow),
    ],
)
def test_no_text_depends_on_the_company(
    n: int, seeds: tuple[int, ...], speculative_config: dict[str, Any], run_engine: RunEngine
) -> None:
    requests = mixed_requests(n, seed=77, grammar=speculative_config is LEARNED)
    orders = {f"company {seed}": shuffled(n, seed) for seed in seeds}
    alone = run_engine([job("alone", requests, one_at_a_time=True)], speculative_config, **ROOMY)
    pressed = run_engine(
        [job(name, [requests[i] for i in order], between_steps=UNREST) for name, order in orders.items()],
        speculative_config,
        **PRESSED,
    )
    expected = token_ids(alone["runs"]["alone"])
    for name, order in orders.items():
        assert differing(expected, token_ids(pressed["runs"][name]), order) == [], name
    counted, metrics = alone["metrics"], pressed["metrics"]
    assert metrics["vllm:num_preemptions"] > n / 50
    assert metrics["vllm:prefix_cache_hits"] > 0
    for name in ("num_mismatches", "num_overrides", "num_unhealthy"):  # the same decisions, each time
        assert metrics[f"vllm:cospec_{name}"] == len(seeds) * counted[f"vllm:cospec_{name}"], name
    assert counted["vllm:cospec_num_overrides"] > n / 4


@pytest.fixture
def short_of_context(pair: Path, tmp_path: Path) -> dict[str, Any]:
    """The bundled pair with a draft of half the context."""
    draft = short_draft(pair, tmp_path / "draft")
    return {"method": "cospec", "model": str(draft), "num_speculative_tokens": 7}


@pytest.mark.engine
def test_one_sequence_beyond_the_drafters_context_costs_the_others_nothing(
    prompts: list[str], run_engine: RunEngine, short_of_context: dict[str, Any]
) -> None:
    """vLLM would stop drafting for all of them, and go on from a cache with a hole."""
    others = [(prompt, GREEDY) for prompt in prompts[:20]]
    long = (("1+1?2;" * 20)[:89], GREEDY | {"max_tokens": 30, "ignore_eos": True})
    result = run_engine(
        [
            job("alone", others, one_at_a_time=True),
            job("long alone", [long], one_at_a_time=True),
            job("beside", [long, *others]),
            job("strict", [(prompt, GREEDY | STRICT) for prompt, _ in others]),
        ],
        short_of_context,
        **ROOMY,
    )
    alone, beside = token_ids(result["runs"]["alone"]), token_ids(result["runs"]["beside"])
    assert beside[0] == token_ids(result["runs"]["long alone"])[0]
    assert beside[1:] == alone
    assert alone != token_ids(result["runs"]["strict"])  # something was arbitrated
    metrics = result["metrics"]
    # the long one is served one token at a time, twice, and counted for each
    assert metrics["vllm:cospec_num_unhealthy[context]"] == 2 * 29
    assert metrics["vllm:cospec_num_unhealthy"] == metrics["vllm:cospec_num_unhealthy[context]"]


@pytest.mark.engine
def test_a_sequence_that_outgrows_the_drafter_leaves_what_it_shares_with_others_alone(
    run_engine: RunEngine, short_of_context: dict[str, Any]
) -> None:
    """From a position beyond its end, vLLM's drafter goes on at the first one, in blocks that others stand on."""
    keep_all = short_of_context | {"arbiter": {"policy": "random", "rate": 1.0}}
    long = (SHARED[:60], GREEDY | {"max_tokens": 30, "ignore_eos": True})
    others = [(f"{SHARED[:33]}{i}+{i + 3}?", GREEDY | {"max_tokens": 15}) for i in range(10, 30)]
    alone = run_engine([job("alone", others, one_at_a_time=True)], keep_all, **ROOMY)
    behind = run_engine(
        [job("long", [long]), job("behind", others, one_at_a_time=True)],
        keep_all,
        **ROOMY | {"enable_prefix_caching": True},
    )
    assert token_ids(behind["runs"]["behind"]) == token_ids(alone["runs"]["alone"])
    assert behind["metrics"]["vllm:prefix_cache_hits"] >= 20 * 32
    assert alone["metrics"]["vllm:cospec_num_overrides"] > 20


@pytest.mark.engine
@pytest.mark.parametrize("n", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_neighbours_of_every_kind_leave_a_text_alone(n: int, prompts: list[str], run_engine: RunEngine) -> None:
    """A step's token budget that ends inside a block, a neighbour's top_p, and the same seeds again."""
    late = [(prompt, GREEDY | extra) for extra in ({}, STRICT) for prompt in prompts[:n]]
    cold = [(prompt, GREEDY | {"temperature": 0.01, "seed": 1}) for prompt in prompts[: n - 4]]
    seeded = [
        (prompt, GREEDY | {"temperature": 0.8, "seed": i} | extra)
        for extra in ({}, STRICT)
        for i, prompt in enumerate(prompts[:n])
    ]
    top_p = [(prompt, GREEDY | {"temperature": 0.5, "top_p": 0.9, "seed": 1}) for prompt in prompts[30 : 26 + n]]
    result = run_engine(
        [
            job("late alone", late, one_at_a_time=True),
            job("cold alone", cold, one_at_a_time=True),
            job("seeded alone", seeded, one_at_a_time=True),
            job("late", late),
            job("cold", [request for both in zip(cold, top_p, strict=True) for request in both]),
            job("seeded", seeded),
            job("seeded again", seeded[::-1]),
        ],
        LEARNED,
        max_num_batched_tokens=16,
        **ROOMY,
    )
    runs = {name: token_ids(run) for name, run in result["runs"].items()}
    assert runs["late"] == runs["late alone"]
    assert runs["late"][:n] != runs["late"][n:]  # something was arbitrated
    assert runs["cold"][::2] == runs["cold alone"]
    assert runs["seeded"] == runs["seeded alone"]
    assert runs["seeded again"][::-1] == runs["seeded alone"]
    assert len({tuple(tokens) for tokens in runs["seeded"]}) > n
    assert result["metrics"]["vllm:cospec_num_unhealthy"] == 0
