"""End to end: a real engine on Model Runner V2, its Triton kernels interpreted, with the bundled pair."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import DEMO, generate

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, Provenance, current_schema, save_artefact, tokenizer_hash

pytestmark = pytest.mark.engine

PROMPTS = ["2+3*4?", "(7-2)*3?", "12+9-4?", "8*8+1?"]
TOKENS = 10


def requests(
    *, strict: tuple[bool, ...] = (), temperature: float = 0.0, max_tokens: int = TOKENS
) -> list[dict[str, Any]]:
    """The prompts with their parameters; those marked strict switch arbitration off."""
    entries = []
    for i, prompt in enumerate(PROMPTS):
        entry = {
            "prompt": prompt,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": 7 + i,
            "ignore_eos": True,
        }
        if i < len(strict) and strict[i]:
            entry["extra_args"] = {"cospec_policy": "strict"}
        entries.append(entry)
    return entries


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained arbiter that keeps some drafts and not others."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(DEMO / "target").get_vocab()
    vocab_size = json.loads((DEMO / "target" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    arbiter = Arbiter((16,))
    config = ArtefactConfig(
        schema=current_schema(draft_logits=True),
        hidden_sizes=(16,),
        threshold=0.5,
        provenance=Provenance(vocab_size=vocab_size, tokenizer_hash=tokenizer_hash(vocabulary)),
    )
    directory = tmp_path_factory.mktemp("arbiter") / "arbiter"
    save_artefact(directory, arbiter, config, "untrained")
    return directory


@pytest.fixture(scope="module")
def stock() -> dict[str, Any]:
    """What stock speculative decoding emits: greedy, then sampled."""
    return generate(
        {"method": "draft_model", "draft_sample_method": "probabilistic"},
        [requests(), requests(temperature=1.0)],
    )


@pytest.fixture(scope="module")
def learned(artefact: Path) -> dict[str, Any]:
    """Greedy and sampled batches under the arbiter, half of the requests strict; then everything strict."""
    half, every = (True, False, True, False), (True,) * 4
    return generate(
        {"method": "cospec", "arbiter": str(artefact), "collect": True, "threshold": 0.4},
        [
            requests(strict=half),
            requests(strict=half, temperature=1.0),
            requests(strict=every),
            requests(strict=every, temperature=1.0),
        ],
    )


def test_the_fused_path_runs_on_v2(learned: dict[str, Any]) -> None:
    assert learned["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert learned["sampler"] == "vllm_cospec.runners.v2"


@pytest.mark.parametrize(("ours", "theirs"), [(2, 0), (3, 1)], ids=["greedy", "sampled"])
def test_strict_batches_emit_what_stock_emits(
    stock: dict[str, Any], learned: dict[str, Any], ours: int, theirs: int
) -> None:
    assert learned["tokens"][ours] == stock["tokens"][theirs]


@pytest.mark.parametrize("batch", [0, 1], ids=["greedy", "sampled"])
def test_strict_requests_beside_arbitrated_ones_emit_what_stock_emits(
    stock: dict[str, Any], learned: dict[str, Any], batch: int
) -> None:
    for request in (0, 2):
        assert learned["tokens"][batch][request] == stock["tokens"][batch][request]


def test_decisions_are_the_arbiters_and_are_counted(artefact: Path, learned: dict[str, Any]) -> None:
    from vllm_cospec.arbiter import load_artefact

    arbiter, _ = load_artefact(artefact)
    decisions = learned["decisions"]
    kept = [d for d in decisions if d["kept"]]
    assert kept, "nothing was overridden"
    assert len(kept) < len(decisions), "everything was overridden"
    scores = arbiter(torch.tensor([d["statistics"] for d in decisions]))
    # float32 sums of 16 terms in another order
    torch.testing.assert_close(scores, torch.tensor([d["probability"] for d in decisions]), rtol=0, atol=1e-5)
    assert [d["kept"] for d in decisions] == [d["probability"] > 0.4 for d in decisions]
    *per_position, mismatches = learned["counters"]
    assert sum(per_position) == len(kept)
    assert mismatches >= len(decisions)
    assert learned["metrics"]["vllm:cospec_num_overrides"] == len(kept)
    assert learned["metrics"]["vllm:cospec_num_mismatches"] == mismatches


def test_chunked_verification_decides_as_the_whole_batch_does(artefact: Path, learned: dict[str, Any]) -> None:
    half = (True, False, True, False)
    chunked = generate(
        {"method": "cospec", "arbiter": str(artefact), "collect": True, "threshold": 0.4},
        [[entry | {"logprobs": 1} for entry in requests(strict=half)], requests(strict=half, temperature=1.0)],
        max_chunk_logits=5,
    )
    assert max(chunked["chunks"]) <= 5 < 16  # a request has up to four rows: no two share a chunk
    assert chunked["tokens"] == learned["tokens"][:2]
    assert chunked["counters"] == learned["counters"]

    def known(run: dict[str, Any]) -> list[tuple[Any, ...]]:
        return sorted((d["request"].partition("-")[0], d["position"], d["kept"]) for d in run["decisions"])

    assert known(chunked) == known(learned)
    kept = [d for d in chunked["decisions"] if d["kept"] and int(d["request"].partition("-")[0]) < len(PROMPTS)]
    assert kept
    for d in kept:  # of the greedy batch: what is reported of a kept draft is what the target gave it
        logprob = chunked["logprobs"][0][int(d["request"].partition("-")[0])][d["position"]]
        assert logprob == pytest.approx(d["statistics"][0], abs=1e-4)


def test_a_preempted_request_keeps_its_budget() -> None:
    """Seven blocks of 32 tokens for four requests of up to 67: some are thrown out and computed again."""
    run = generate(
        {"method": "cospec", "arbiter": {"policy": "cascade", "alpha": 1.0}, "collect": True, "max_overrides": 3},
        [requests(max_tokens=60)],
        num_gpu_blocks_override=7,
        block_size=32,
    )
    assert run["metrics"]["vllm:num_preemptions"] > 0
    kept = Counter(d["request"] for d in run["decisions"] if d["kept"])
    assert len(kept) == len(PROMPTS)
    assert set(kept.values()) == {3}


def test_v1_on_a_device_serves_strict_requests_as_stock_v1_does_and_arbitrates_the_rest(artefact: Path) -> None:
    half = (True, False, True, False)
    stock_v1 = generate(
        {"method": "draft_model", "draft_sample_method": "probabilistic"},
        [requests(), requests(temperature=1.0)],
        v1=True,
        worker_cls="mended_worker.MendedDeviceWorker",
    )
    batches = [requests(strict=half), requests(strict=half, temperature=1.0), requests(strict=(True,) * 4)]
    ours = generate({"method": "cospec", "arbiter": str(artefact), "collect": True, "threshold": 0.4}, batches, v1=True)
    assert ours["sampler"] == "vllm_cospec.runners.v1_gpu"
    assert ours["tokens"][2] == stock_v1["tokens"][0]
    for batch in (0, 1):
        for request in (0, 2):
            assert ours["tokens"][batch][request] == stock_v1["tokens"][batch][request], batch
    kept = [d for d in ours["decisions"] if d["kept"]]
    assert kept
    assert len(kept) < len(ours["decisions"])
    assert ours["metrics"]["vllm:cospec_num_overrides"] == len(kept)


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
def test_a_rule_that_ignores_the_draft_needs_none_of_its_logits(v1: bool) -> None:
    greedy, half = {"draft_sample_method": "greedy"}, (True, False, True, False)
    worker = {"worker_cls": "mended_worker.MendedDeviceWorker"} if v1 else {}
    stock = generate({"method": "draft_model", **greedy}, [requests(), requests(temperature=1.0)], v1=v1, **worker)
    ours = generate(
        {"method": "cospec", "arbiter": {"policy": "random", "rate": 0.5}, **greedy},
        [requests(strict=half), requests(strict=half, temperature=1.0)],
        v1=v1,
    )
    assert ours["sampler"] == f"vllm_cospec.runners.{'v1_gpu' if v1 else 'v2'}"
    assert not ours["keeps_draft_logits"]
    for batch in (0, 1):
        for request in (0, 2):
            assert ours["tokens"][batch][request] == stock["tokens"][batch][request], batch
    assert ours["metrics"]["vllm:cospec_num_overrides"] > 0


def test_overrides_change_the_text(stock: dict[str, Any], learned: dict[str, Any]) -> None:
    changed = [learned["tokens"][b][r] != stock["tokens"][b][r] for b in (0, 1) for r in (1, 3)]
    assert any(changed)
