"""``strict`` emits token for token what stock vLLM emits with the same drafter.

float32 throughout: in bfloat16 near-ties flip with the composition of a batch, in stock vLLM as well. For sampled
requests the stock engine has its sampling bugs mended, as ours has: without that no seeded text is repeatable.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunEngine = Callable[..., dict[str, Any]]
GREEDY = {"temperature": 0, "max_tokens": 60}
UNSEEDED = {"temperature": 1.0, "max_tokens": 60}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 60}
ALONE = 12  # of the prompts, one step of the engine for every few tokens
NGRAM = {"num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}


def drafter(name: str, pair: Path) -> dict[str, Any]:
    """vLLM's own keys for a drafter, without the method."""
    return NGRAM if name == "ngram" else {"model": str(pair / "draft"), "num_speculative_tokens": 5}


def jobs(prompts: list[str], alone: int, extra_args: dict[str, Any] | None, drawn: bool) -> list[dict[str, Any]]:
    """Greedy and seeded sampling, and unseeded where drafts are drawn, sixteen requests at a time, and some alone."""

    def params(base: dict[str, Any], i: int) -> dict[str, Any]:
        seed = {"seed": 1000 + i} if base is SAMPLED else {}
        return base | seed | ({"extra_args": extra_args} if extra_args else {})

    return [
        {"name": f"{name}-{concurrency}", "prompts": prompts[:n], "params": [params(base, i) for i in range(n)],
         "one_at_a_time": concurrency == 1}
        for name, base in (("greedy", GREEDY), ("sampled", SAMPLED), ("unseeded", UNSEEDED))[: 2 + drawn]
        for concurrency, n in ((1, alone), (16, len(prompts)))
    ]  # fmt: skip


def tokens(result: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Token ids of every run and prompt."""
    return {name: [outputs[0]["token_ids"] for outputs in run] for name, run in result["runs"].items()}


@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("alone", [ALONE, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "drawn"),
    [("draft_model", True), pytest.param("draft_model", False, marks=pytest.mark.slow), ("ngram", False)],
)
def test_strict_is_stock(
    name: str, drawn: bool, alone: int, pair: Path, prompts: list[str], run_engine: RunEngine
) -> None:
    keys = drafter(name, pair) | ({"draft_sample_method": "probabilistic"} if drawn else {})
    stock = run_engine(jobs(prompts, alone, None, name != "ngram"), {"method": name, **keys}, mend=True)
    by_server = run_engine(
        jobs(prompts, alone, None, name != "ngram"),
        {"method": "cospec", "draft_method": name, **keys, "arbiter": {"policy": "strict"}},
    )
    by_request = run_engine(
        jobs(prompts, alone, {"cospec_policy": "strict"}, name != "ngram"),
        {"method": "cospec", "draft_method": name, **keys, "arbiter": {"policy": "cascade", "alpha": 1.0}},
    )
    expected = tokens(stock)
    assert {len(run) for run in expected.values()} == {alone, len(prompts)}
    assert len(prompts) >= 200
    assert len({tuple(t) for t in expected["sampled-16"]}) > 150  # the sampled run really sampled
    assert tokens(by_server) == expected
    assert tokens(by_request) == expected
    assert by_request["metrics"]["vllm:cospec_num_mismatches"] == 0
    # what a trainer asks that must not roll out with a lossy verifier; requests may ask for more than strict
    said = [(found["lossy"], found["policy"]) for run in (by_server, by_request) for found in run["described"]]
    assert said == [(False, "strict"), (True, "cascade")]


@pytest.mark.engine
def test_strict_requests_in_a_mixed_batch_are_stock(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    keys = drafter("draft_model", pair)
    stock = run_engine([{"name": "run", "prompts": prompts, "params": GREEDY}], {"method": "draft_model", **keys})
    strict = GREEDY | {"extra_args": {"cospec_policy": "strict"}}
    mixed = run_engine(
        [{"name": "run", "prompts": prompts, "params": [strict if i % 2 else GREEDY for i in range(len(prompts))]}],
        {"method": "cospec", **keys, "arbiter": {"policy": "cascade", "alpha": 1.0}},
    )
    expected, found = tokens(stock)["run"], tokens(mixed)["run"]
    assert found[1::2] == expected[1::2]
    assert found[0::2] != expected[0::2]  # keeping every draft does change the others
    assert mixed["metrics"]["vllm:cospec_num_overrides"] > 0
