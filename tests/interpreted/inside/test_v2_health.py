"""Drafts that are not whole on Model Runner V2: strict, counted by reason, and no harm to whoever runs beside them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from company import short_draft
from processes import DEMO, OUTGROWS_DRAFT, generate
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

from vllm_cospec.health import REASONS
from vllm_cospec.runners.v2_drafter import DraftHealth, NgramMatches

K, CONTEXT, MODEL_LENGTH = 3, 40, 64
CPU = torch.device("cpu")
KEEP_ALL = {"policy": "random", "rate": 1.0}


def batch(**columns: Any) -> SimpleNamespace:
    """An InputBatch of three requests in slots 2, 0 and 5, each with three drafts behind ten computed tokens."""
    values = {"counts": [K, K, K], "computed": [10, 10, 10], "prefilling": [False] * 3, **columns}
    counts, computed = (np.array(values[name], np.int32) for name in ("counts", "computed"))
    known = np.array(
        values.get("known", computed), np.int32
    )  # on the device: what the host takes for accepted may not be
    slots, rows = np.array([2, 0, 5]), counts + 1
    return SimpleNamespace(
        idx_mapping_np=slots,
        idx_mapping=torch.from_numpy(slots),
        num_reqs=3,
        num_draft_tokens_per_req=counts,
        num_computed_tokens_np=computed,
        is_prefilling_np=np.array(values["prefilling"]),
        cu_num_logits=torch.tensor(np.concatenate([[0], np.cumsum(rows)])),
        seq_lens=torch.from_numpy(known + rows),
    )


def installed(device: torch.device = CPU, **changes: Any) -> tuple[DraftHealth, Any, SimpleNamespace]:
    """Health of six slots, whose requests all want to be arbitrated, with its counters."""
    values = {"kv_consumer": False, "failing": "fail", "mm_drafter": False, "draft_logits": True, **changes}
    transfer = SimpleNamespace(is_kv_consumer=True, kv_load_failure_policy=values["failing"])
    runner = SimpleNamespace(
        device=device,
        max_num_reqs=6,
        max_model_len=MODEL_LENGTH,
        speculator=SimpleNamespace(supports_mm_inputs=values["mm_drafter"]),
        vllm_config=SimpleNamespace(kv_transfer_config=transfer if values["kv_consumer"] else None),
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(max_model_len=CONTEXT),
        ),
    )
    counters: Any = SimpleNamespace(unhealthy=torch.zeros(len(REASONS), dtype=torch.int64, device=device))
    settings: Any = SimpleNamespace(num_speculative_tokens=K, draft_logits=values["draft_logits"])
    health = DraftHealth(runner, settings, counters)
    wanted = SimpleNamespace(np=np.ones(6, np.int32), gpu=torch.ones(6, dtype=torch.int32, device=device))
    for slot in (0, 2, 5):
        health.add_request(slot, request())
    return health, wanted, counters


def request(**changes: Any) -> SimpleNamespace:
    values = {"prompt_embeds": None, "mm_features": [], "num_computed_tokens": 0, "structured": None, **changes}
    values["sampling_params"] = SimpleNamespace(structured_outputs=values.pop("structured"))
    return SimpleNamespace(**values)


def counted(counters: SimpleNamespace) -> dict[str, int]:
    return {str(reason): int(n) for reason, n in zip(REASONS, counters.unhealthy, strict=True) if n}


def test_whole_drafts_cost_nothing() -> None:
    health, wanted, counters = installed()
    found = health.arbitrated(batch(computed=[10, CONTEXT - K, 20]), wanted)
    assert found.on_device is wanted.gpu
    assert found.on_host is wanted.np
    assert counted(counters) == {}


def test_a_draft_made_beyond_the_drafters_context_is_strict_by_what_the_device_knows() -> None:
    health, wanted, counters = installed()
    wanted.np[5] = wanted.gpu[5] = 0
    for known, strict in ((CONTEXT - K, False), (CONTEXT - K + 1, True), (CONTEXT + 9, True)):
        counters.unhealthy.zero_()
        found = health.arbitrated(batch(computed=[10, CONTEXT + 9, CONTEXT + 9], known=[10, known, known]), wanted)
        assert found.on_device.tolist() == [int(not strict), 1, 1, 1, 1, 0]
        assert counted(counters) == ({"context": K} if strict else {})  # a request that is strict anyway is not counted


@pytest.mark.parametrize(
    ("blind", "changes", "strict"),
    [
        ({"num_computed_tokens": 16}, {}, False),  # vLLM's own prefix cache holds the draft's layers too
        ({"num_computed_tokens": 16}, {"kv_consumer": True}, True),
        ({"num_computed_tokens": 0}, {"kv_consumer": True}, False),
        ({"prompt_embeds": torch.zeros(1)}, {}, True),
        ({"mm_features": ["image"]}, {}, True),
        ({"mm_features": ["image"]}, {"mm_drafter": True}, False),
        ({"mm_features": ["image"], "num_computed_tokens": 16}, {"kv_consumer": True, "draft_logits": False}, False),
        ({"num_computed_tokens": 16}, {"kv_consumer": True, "failing": "recompute", "draft_logits": False}, True),
    ],
)
def test_a_request_the_drafter_has_not_seen_is_strict_for_good(
    blind: dict[str, Any], changes: dict[str, Any], strict: bool
) -> None:
    health, wanted, counters = installed(**changes)
    health.add_request(0, request(**blind))
    for step in (1, 2):
        found = health.arbitrated(batch(), wanted)
        assert found.on_host.tolist() == found.on_device.tolist() == [int(not strict), 1, 1, 1, 1, 1]
        assert counted(counters) == ({"cache": K * step} if strict else {})
    health.add_request(0, request())  # the slot's next owner
    assert health.arbitrated(batch(), wanted).on_device.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("columns", "structured", "strict"),
    [
        ({"counts": [K, 1, K]}, None, True),
        ({"counts": [K, 1, K]}, "a grammar", False),  # which shortens its own drafts
        ({"counts": [K, 1, K], "computed": [10, MODEL_LENGTH - K - 1, 10], "known": [10, 12, 10]}, None, False),
        ({"counts": [K, 1, K], "computed": [10, MODEL_LENGTH - K - 2, 10], "known": [10, 12, 10]}, None, True),
        ({"counts": [K, 1, K], "prefilling": [False, True, False]}, None, False),
    ],
    ids=["load", "grammar", "no room", "room", "placeholders"],
)
def test_a_block_that_others_cut_short_is_strict(columns: dict[str, Any], structured: Any, strict: bool) -> None:
    health, wanted, counters = installed()
    health.add_request(0, request(structured=structured))
    found = health.arbitrated(batch(**columns), wanted)
    assert found.on_device.tolist() == [int(not strict), 1, 1, 1, 1, 1]
    assert counted(counters) == ({"draft_count": 1} if strict else {})


def test_nothing_waits_for_the_device() -> None:
    meta = torch.device("meta")  # where every read of a value raises
    health, wanted, _ = installed(meta, kv_consumer=True)
    health.add_request(2, request(num_computed_tokens=16))
    step = batch(counts=[K, 1, K], computed=[10, 10, CONTEXT])  # one of each kind
    for name in ("idx_mapping", "cu_num_logits", "seq_lens"):
        setattr(step, name, getattr(step, name).to(meta))
    found = health.arbitrated(step, wanted)
    assert found.on_host.tolist() == [0, 1, 0, 1, 1, 1]
    assert found.on_device.device == meta


def test_ngram_drafts_that_were_not_found_are_none() -> None:
    texts = {1: [1, 2, 3, 4, 9, 1, 2, 3], 4: [1, 2, 3, 4, 5, 6], 0: [7, 8, 7, 8], 2: [5, 6, 5, 6, 5, 6]}
    texts[3] = texts[1]
    length = torch.tensor([len(texts.get(slot, [])) for slot in range(6)], dtype=torch.int32)
    tokens = torch.zeros(6, MODEL_LENGTH, dtype=torch.int32)
    for slot, text in texts.items():
        tokens[slot, : len(text)] = torch.tensor(text)
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=tokens), total_len=SimpleNamespace(gpu=length))
    speculative = SimpleNamespace(prompt_lookup_min=2, prompt_lookup_max=3, num_speculative_tokens=K)
    config: Any = SimpleNamespace(
        speculative_config=speculative, scheduler_config=SimpleNamespace(max_num_seqs=6),
        model_config=SimpleNamespace(max_model_len=MODEL_LENGTH),
    )  # fmt: skip
    speculator = NgramGPUSpeculator(config, torch.device("cpu"), states)  # type: ignore[arg-type]
    matches = NgramMatches(speculator)
    slots = torch.tensor([1, 4, 0, 2, 3])
    last = torch.tensor([texts[int(slot)][-1] if int(slot) in texts else 0 for slot in range(6)]).view(-1, 1)
    batch: Any = SimpleNamespace(num_reqs=5, idx_mapping=slots, seq_lens=torch.tensor([7, 5, 3, 3, 7]))
    drafts = speculator.propose(
        batch, None, None, last, None,
        torch.tensor([1, 1, 1, 0, 0]), last, last, last, last, last,
    )  # fmt: skip
    # 6: nothing found; 8: two of K; the fourth request is in the middle of its prompt, the last one is resumed
    assert drafts.tolist() == [[4, 9, 1], [6, 6, 6], [7, 8, 8], [6, 6, 6], [4, 9, 1]]
    rows = torch.arange(K + 1).repeat(5)
    verified = SimpleNamespace(expanded_idx_mapping=slots.repeat_interleave(K + 1), expanded_local_pos=rows)
    absent = matches.absent(verified, torch.ones(6, dtype=torch.int32)).view(5, K + 1)
    assert absent.tolist() == [
        [False, False, False, False], [False, True, True, True], [False, False, False, True], [False, True, True, True],
        [False, False, False, False],
    ]  # fmt: skip
    assert not matches.absent(verified, torch.zeros(6, dtype=torch.int32)).any()  # strict requests keep stock's drafts


@pytest.fixture(scope="module")
def draft_of_48(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled draft with a context of 48 positions."""
    return short_draft(DEMO, tmp_path_factory.mktemp("draft") / "draft", context=48)


def ask(prompt: str, max_tokens: int = 12, **parameters: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **parameters}


STRICT: dict[str, Any] = {"extra_args": {"cospec_policy": "strict"}}
SHORT = ["2+3*4?", "(7-2)*3?", "12+9-4?"]
LONG = "+".join(str(n) for n in range(1, 30)) + "?"  # 79 characters


@pytest.mark.skipif(not OUTGROWS_DRAFT, reason="this vLLM serves no more than the draft's context on V2")
@pytest.mark.engine
def test_a_long_request_is_strict_behind_the_drafters_context_and_leaves_the_others_alone(draft_of_48: Path) -> None:
    growing = "+".join(str(n) for n in range(1, 17)) + "?"  # 39 characters: it outgrows the context on its way
    long = [ask(LONG), ask(LONG, **STRICT)]
    run = generate(
        {"method": "cospec", "model": str(draft_of_48), "arbiter": KEEP_ALL, "collect": True},
        [
            *([ask(prompt)] for prompt in SHORT),
            long,
            [ask(growing, 24)],
            [*map(ask, SHORT), ask(LONG), ask(growing, 24)],
        ],
        block_size=32,
        max_num_seqs=5,
        dummy_runs=True,
    )
    alone, company = [texts[0] for texts in run["tokens"][:3]], run["tokens"][5]
    assert company[:3] == alone
    assert run["tokens"][3][0] == run["tokens"][3][1]
    assert company[3:] == [run["tokens"][3][0], run["tokens"][4][0]]
    by_request: dict[str, list[int]] = {}
    for decision in run["decisions"]:
        by_request.setdefault(decision["request"].partition("-")[0], []).append(decision["position"])
    assert {"3", "4"}.isdisjoint(by_request)  # the long ones
    # 39 tokens of prompt: the draft for output position p is made from position 38 + p, and the drafter has 48
    assert by_request["5"]
    assert max(by_request["5"]) < 48 - 38
    assert set(run["unhealthy"]) == {"context"}


@pytest.mark.engine
def test_a_prefix_that_came_without_the_drafts_layers_makes_a_request_strict(tmp_path: Path) -> None:
    transfer = {
        "kv_connector": "HalfConnector", "kv_connector_module_path": "half_connector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }  # fmt: skip
    run = generate(
        {"method": "cospec", "arbiter": KEEP_ALL, "collect": True},
        [
            [ask(LONG)],
            [ask(LONG)],
            [ask(LONG, **STRICT)],
            [ask(SHORT[0], as_embeddings=True)],
            [ask(SHORT[0], **STRICT)],
        ],
        block_size=32,
        enable_prefix_caching=False,
        kv_transfer_config=transfer,
        enable_prompt_embeds=True,
    )
    (first,), (loaded,), (strict,), (embedded,), (same,) = run["tokens"]
    assert loaded == strict != first
    assert embedded == same
    assert {decision["request"].partition("-")[0] for decision in run["decisions"]} == {"0"}
    assert set(run["unhealthy"]) == {"cache"}
    assert run["unhealthy"]["cache"] >= 2 * K


@pytest.mark.engine
def test_an_arbiter_keeps_no_ngram_drafts_that_nobody_found() -> None:
    run = generate(
        {"method": "cospec", "draft_method": "ngram", "prompt_lookup_min": 5, "arbiter": KEEP_ALL, "collect": True},
        [[ask(SHORT[0])], [ask(SHORT[0], **STRICT)], [ask("1+2+3+4+1+2+3+4+1+2+3?")]],
    )
    assert run["tokens"][0] == run["tokens"][1]
    assert run["counters"][-1] == len(run["decisions"])  # mismatches: of what was found alone
    assert run["unhealthy"] == {}
