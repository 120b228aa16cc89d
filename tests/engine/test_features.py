"""What an engine offers keeps working when drafts are arbitrated, and arbitration keeps its own promises.

`cascade` with alpha 1 keeps every legal draft token: the most that any policy could do, so the hardest on the engine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from company import is_thinking

from vllm_cospec.training.pairs.demo import build_tokenizer

RunEngine = Callable[..., dict[str, Any]]
KEEP_ALL = {"policy": "cascade", "alpha": 1.0}
GREEDY = {"temperature": 0, "max_tokens": 60}
STRICT = {"extra_args": {"cospec_policy": "strict"}}
PENALISED = {"repetition_penalty": 1.2, "frequency_penalty": 0.2, "presence_penalty": 0.2, "max_tokens": 60}
PAD = 0


def cospec(pair: Path, arbiter: Any = KEEP_ALL, **keys: Any) -> dict[str, Any]:
    return {"method": "cospec", "model": str(pair / "draft"), "num_speculative_tokens": 5, "arbiter": arbiter, **keys}


def token_ids(outputs: list[list[dict[str, Any]]]) -> list[list[int]]:
    return [completions[0]["token_ids"] for completions in outputs]


@pytest.mark.engine
def test_requests_get_what_they_asked_for(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    some = prompts[:40]
    digits = [15 + 4 + 1 + d for d in range(10)]  # ids of "0" to "9": behind 4 special tokens, "\n" and " " to "/"
    result = run_engine(
        [
            {"name": "logprobs", "prompts": some, "params": GREEDY | {"logprobs": 3}},
            {"name": "stop", "prompts": some, "params": GREEDY | {"stop": [";"]}},
            {"name": "several", "prompts": some, "params": {"temperature": 1.0, "n": 4, "max_tokens": 40, "seed": 5}},
            {"name": "allowed", "prompts": some, "params": GREEDY | {"allowed_token_ids": digits}},
            {"name": "bad words", "prompts": some, "params": GREEDY | {"bad_words": ["="]}},
            {"name": "minimum", "prompts": some, "params": GREEDY | {"min_tokens": 55}},
            {"name": "top-k", "prompts": some, "params": {"temperature": 1.0, "top_k": 1, "max_tokens": 60, "seed": 5}},
            {
                "name": "penalised top-k",
                "prompts": some,
                "params": PENALISED | {"temperature": 1.0, "top_k": 1, "seed": 5},
            },
            {"name": "penalised strict", "prompts": some, "params": PENALISED | GREEDY | STRICT},
            {"name": "penalised", "prompts": some, "params": PENALISED | GREEDY},
            {"name": "top-k strict", "prompts": some, "params": GREEDY | {"extra_args": {"cospec_policy": "strict"}}},
        ],
        cospec(pair),
    )
    runs = result["runs"]
    assert result["metrics"]["vllm:cospec_num_overrides"] > 0
    for completions in runs["stop"]:
        assert ";" not in completions[0]["text"]
        assert completions[0]["finish_reason"] == "stop"
    for completions in runs["several"]:
        assert len(completions) == 4
    assert sum(len({c["text"] for c in completions}) > 1 for completions in runs["several"]) > 20
    assert {token for tokens in token_ids(runs["allowed"]) for token in tokens} <= set(digits)
    assert not any("=" in completions[0]["text"] for completions in runs["bad words"])
    assert all(len(tokens) >= 55 for tokens in token_ids(runs["minimum"]))
    # with top_k=1 only the target's first choice is legal: no override is possible
    assert token_ids(runs["top-k"]) == token_ids(runs["top-k strict"])
    # penalties move the target's choice, and what may be kept goes by the choice they leave
    assert token_ids(runs["penalised top-k"]) == token_ids(runs["penalised strict"])
    assert token_ids(runs["penalised strict"]) != token_ids(runs["top-k strict"])
    assert token_ids(runs["penalised"]) != token_ids(runs["penalised strict"])
    check_logprobs(pair, some, runs["logprobs"])


def check_logprobs(pair: Path, prompts: list[str], outputs: list[list[dict[str, Any]]]) -> None:
    """Every reported log-probability is the target's own, for kept drafts as well."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    model = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32)
    overridden = 0
    for prompt, completions in zip(prompts, outputs, strict=True):
        ids, logprobs = completions[0]["token_ids"], completions[0]["logprobs"]
        context = tokenizer.encode(prompt)
        with torch.no_grad():
            expected = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
        for position, token in enumerate(ids):
            value, rank = logprobs[position][str(token)]
            # 1e-3: two implementations of the same float32 model, sums in another order
            assert value == pytest.approx(expected[position, token].item(), abs=1e-3)
            overridden += rank > 1
    assert overridden > 0


@pytest.mark.engine
def test_budgets_hold_per_request(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    prompts = prompts[:100]
    runs = [
        {"name": "server", "prompts": prompts, "params": GREEDY},
        {"name": "request", "prompts": prompts,
         "params": GREEDY | {"extra_args": {"cospec_max_overrides": 1, "cospec_exact_tokens": 20}}},
        {"name": "none", "prompts": prompts, "params": GREEDY | {"extra_args": {"cospec_max_overrides": 0}}},
        {"name": "no regret", "prompts": prompts, "params": GREEDY | {"extra_args": {"cospec_max_regret": 0.0}}},
        {"name": "strict", "prompts": prompts, "params": GREEDY | {"extra_args": {"cospec_policy": "strict"}}},
    ]  # fmt: skip
    result = run_engine(runs, cospec(pair, max_overrides=2, exact_tokens=6, collect=True))
    # vLLM numbers requests in order of arrival, so the run of a decision can be told from its request
    by_request: dict[str, list[int]] = defaultdict(list)
    for decision in result["decisions"]:
        if decision["kept"]:
            by_request[decision["request_id"].split("-")[0]].append(decision["output_position"])
    n = len(prompts)
    server = [positions for request, positions in by_request.items() if int(request) < n]
    request = [positions for request, positions in by_request.items() if n <= int(request) < 2 * n]
    others = [request for request in by_request if int(request) >= 2 * n]
    assert server
    assert max(map(len, server)) == 2
    assert min(map(min, server)) >= 6
    assert request
    assert max(map(len, request)) == 1
    assert min(map(min, request)) >= 20
    assert not others
    strict = token_ids(result["runs"]["strict"])
    assert token_ids(result["runs"]["none"]) == token_ids(result["runs"]["no regret"]) == strict
    for exact, run in ((6, "server"), (20, "request")):
        assert [t[:exact] for t in token_ids(result["runs"][run])] == [t[:exact] for t in strict]
    overrides = sum(len(positions) for positions in by_request.values())
    assert result["metrics"]["vllm:cospec_num_overrides"] == overrides
    assert result["metrics"]["vllm:cospec_num_mismatches"] >= overrides
    assert sum(result["metrics"][f"vllm:cospec_num_overrides_per_pos[{i}]"] for i in range(5)) == overrides


@pytest.mark.engine
def test_memory_pressure_caching_and_chunking(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    """Output does not change, arbitrated or strict: blocks keep their boundaries over a preemption."""
    prompts = prompts[:80]
    strict = GREEDY | {"extra_args": {"cospec_policy": "strict"}}
    runs = [
        {"name": "strict", "prompts": prompts, "params": strict},
        {"name": "arbitrated", "prompts": prompts, "params": GREEDY},
    ]
    settings = cospec(pair, max_overrides=2, collect=True)
    plain = run_engine(runs, settings, enable_prefix_caching=False)
    pressed = run_engine(
        runs, settings, enable_prefix_caching=True, enable_chunked_prefill=True, max_num_batched_tokens=96,
        kv_cache_memory_bytes=3 * 2**20, block_size=32,  # room for about four of the sixteen sequences
    )  # fmt: skip
    assert pressed["metrics"]["vllm:num_preemptions"] > 0
    assert token_ids(pressed["runs"]["strict"]) == token_ids(plain["runs"]["strict"])
    assert token_ids(pressed["runs"]["arbitrated"]) == token_ids(plain["runs"]["arbitrated"])
    kept = Counter(decision["request_id"] for decision in pressed["decisions"] if decision["kept"])
    assert kept
    assert max(kept.values()) == 2  # the budget outlives a preemption


@pytest.mark.engine
def test_a_request_that_outgrows_the_drafter_is_verified_strictly(
    pair: Path, prompts: list[str], run_engine: RunEngine
) -> None:
    """vLLM then fills the drafts with zeros, and zero is <pad>: even `cascade` with alpha 1 must not keep those."""
    result = run_engine([{"name": "run", "prompts": prompts[:40], "params": GREEDY}], cospec(pair, max_model_len=32))
    found = Counter(token for tokens in token_ids(result["runs"]["run"]) for token in tokens)
    assert found[PAD] == 0
    assert any(len(tokens) > 24 for tokens in token_ids(result["runs"]["run"]))
    assert result["metrics"]["vllm:cospec_num_overrides"] > 0  # while there was room


@pytest.mark.engine
def test_sampled_output_follows_the_target(pair: Path, run_engine: RunEngine) -> None:
    """Strict sampling with temperature and top-k: the second token's frequencies are the target's probabilities."""
    from scipy.stats import chisquare
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt, temperature, top_k, n = "12+", 2.0, 8, 2500
    result = run_engine(
        [{"name": "run", "prompts": [prompt], "params":
          {"temperature": temperature, "top_k": top_k, "n": n, "max_tokens": 4, "ignore_eos": True, "seed": 1}}],
        cospec(pair, arbiter={"policy": "strict"}), max_num_seqs=64,
    )  # fmt: skip
    pairs = [tuple(c["token_ids"][:2]) for c in result["runs"]["run"][0]]
    first, count = Counter(a for a, _ in pairs).most_common(1)[0]
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    model = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*tokenizer.encode(prompt), first]])).logits[0, -1] / temperature
    kept = logits.topk(top_k)
    probabilities = kept.values.softmax(0)
    seen = Counter(b for a, b in pairs if a == first)
    assert set(seen) <= set(kept.indices.tolist())
    frequent = [i for i in range(top_k) if probabilities[i] * count >= 5]  # chi-square needs expected counts of 5
    assert len(frequent) >= 3
    observed = [seen[int(kept.indices[i])] for i in frequent]
    expected = torch.tensor([probabilities[i].item() for i in frequent], dtype=torch.float64)
    expected = expected / expected.sum() * sum(observed)
    assert chisquare(observed, expected.numpy()).pvalue > 1e-4


@pytest.mark.engine
def test_what_is_counted_was_delivered(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    some = (prompts * 3)[:100]
    short = {"temperature": 0, "max_tokens": 2}
    runs = [
        {"name": "short", "prompts": some, "params": short},
        {"name": "short strict", "prompts": some, "params": short | STRICT},
    ]
    result = run_engine(runs, cospec(pair, collect=True))
    changed = sum(
        ours != theirs
        for ours, theirs in zip(
            token_ids(result["runs"]["short"]), token_ids(result["runs"]["short strict"]), strict=True
        )
    )
    # a block's first draft is the second token, the last of the response
    assert result["metrics"]["vllm:cospec_num_overrides"] == changed
    assert changed <= result["metrics"]["vllm:cospec_num_mismatches"] <= 100
    assert result["metrics"]["vllm:cospec_num_overrides_per_pos[0]"] == changed

    stopped = {"temperature": 0, "max_tokens": 60, "stop_token_ids": list(range(20, 25))}
    result = run_engine([{"name": "stopped", "prompts": some, "params": stopped}], cospec(pair, collect=True))
    lengths = {i: len(tokens) for i, tokens in enumerate(token_ids(result["runs"]["stopped"]))}
    assert min(lengths.values()) < 10
    kept = [d for d in result["decisions"] if d["kept"]]
    assert kept
    assert all(d["output_position"] < lengths[int(d["request_id"].split("-")[0])] for d in kept)
    assert result["metrics"]["vllm:cospec_num_overrides"] == len(kept)


@pytest.mark.engine
def test_drafts_are_kept_in_their_scope_only(pair: Path, prompts: list[str], run_engine: RunEngine) -> None:
    markers = begin, end = [build_tokenizer().get_vocab()[digit] for digit in "12"]
    scopes, prompts = ("thinking", "answer", "all"), prompts[:80]
    runs = [
        {"name": scope, "prompts": prompts, "params": GREEDY | {"extra_args": {"cospec_scope": scope}}}
        for scope in scopes
    ]
    result = run_engine(runs, cospec(pair, thinking_tokens=markers, collect=True))
    n, kept = len(prompts), Counter[tuple[str, bool]]()
    for decision in result["decisions"]:
        run, place = divmod(int(decision["request_id"].split("-")[0]), n)
        text = token_ids(result["runs"][scopes[run]])[place]
        thinking = is_thinking(prompts[place], text[: decision["output_position"]], begin, end)
        kept[scopes[run], thinking] += decision["kept"]
    assert kept["thinking", True] > 10
    assert kept["answer", False] > 10
    assert kept["thinking", False] == kept["answer", True] == 0
    assert min(kept["all", True], kept["all", False]) > 10


@pytest.mark.engine
def test_input_that_comes_in_parts_is_answered_strictly(pair: Path, run_engine: RunEngine) -> None:
    """Whatever was drafted behind the end of an answer, the request goes on with the next part."""
    parts = ["384-14*2-146?", "12+34?", "9*8+7?"]
    params = GREEDY | {"max_tokens": 9}
    runs = [
        {"name": "parts", "prompts": parts, "params": params, "in_parts": True},
        {"name": "first", "prompts": parts[:1], "params": params | STRICT},
    ]
    result = run_engine(runs, cospec(pair))
    responses = token_ids(result["runs"]["parts"])
    assert len(responses) == 3
    assert all(responses)
    assert responses[0] == token_ids(result["runs"]["first"])[0]
    assert result["metrics"]["vllm:cospec_num_mismatches"] == 0
