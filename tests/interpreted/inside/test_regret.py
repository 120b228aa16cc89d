"""The regret budget in the kernels, on either runner: against the reference, the CPU path and stock verification."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arbitration_cases as cases
import numpy as np
import pytest
import torch
from agreement import check
from v1_cases import IDS, Step, installed
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from vllm_cospec.kernels.policies import Random
from vllm_cospec.kernels.regret import REGRET_UNIT
from vllm_cospec.runners import v1_cpu, v1_gpu

pytestmark = pytest.mark.usefixtures("poison")

KEEP_ALL = Random(rate=1.0)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(is_first_rank=True))


@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("name", ["random", "learned"])
def test_overrides_within_a_budget_are_the_references(name: str, regime: str) -> None:
    compared = total = 0
    policy = KEEP_ALL if name == "random" else cases.POLICIES[name]
    for variant in range(2):
        case = cases.make_case(
            50 * variant + cases.REGIMES.index(regime), k=(5, 16)[variant], requests=6, regime=regime,
            separate=variant == 1 or regime == "nan", dtype=(torch.float32, torch.bfloat16)[variant],
            agreement=0.3, budgets=True,
        )  # fmt: skip
        compared += check(case, policy, cases.arbiter(32))
        total += len(case.num_drafts)
    assert compared >= 0.8 * total


@pytest.mark.parametrize("separate", [False, True])
def test_a_budget_of_nothing_gives_the_tokens_of_stock(separate: bool) -> None:
    changed = 0
    for seed in range(6):
        case = cases.make_case(
            seed, requests=6, regime="ties" if seed % 2 else "plain", separate=separate, arbitrated=1.0, agreement=0.4
        )
        sampled, num_sampled = case.stock()
        free, _, _ = case.ours(KEEP_ALL)
        changed += free.num_sampled.tolist() != num_sampled.tolist()
        case.slots.max_regret.fill_(0.0)
        got, _, slots = case.ours(KEEP_ALL)
        assert got.num_sampled.tolist() == num_sampled.tolist()
        for request, count in enumerate(num_sampled.tolist()):
            assert got.sampled[request, :count].tolist() == sampled[request, :count].tolist()
        assert not slots.regret_so_far.any()
    assert changed > 3


@pytest.mark.parametrize("sampled", [0.0, 0.6])
def test_on_v1_the_kernels_spend_what_the_cpu_path_spends(sampled: float, tmp_path: Path, one_rank: None) -> None:
    extra: dict[str, dict[str, Any]] = {
        name: {"cospec_max_regret": budget} for name, budget in zip(IDS, (0.0, REGRET_UNIT, 1.0, 2.0), strict=False)
    }
    (theirs, cpu), (ours, device) = (installed(module, KEEP_ALL, tmp_path, IDS, extra) for module in (v1_cpu, v1_gpu))
    free, unlimited = installed(v1_cpu, KEEP_ALL, tmp_path / "free", IDS)
    kept, kept_without = dict.fromkeys(IDS, 0), dict.fromkeys(IDS, 0)
    for seed in range(8):
        ids = [IDS[(i + seed) % len(IDS)] for i in range(len(IDS))]
        step = Step(10 * seed, ids, sampled)
        assert torch.equal(ours.run(device, step), theirs.run(cpu, step)), seed
        free.run(unlimited, step)
        for count, found in ((kept, device), (kept_without, unlimited)):
            for decision in found.take_decisions():
                count[decision.request_id] += decision.kept
    assert kept[IDS[0]] == 0 < kept_without[IDS[0]]
    assert 0 < sum(kept.values()) < sum(kept_without.values())
    slots = device._slots
    spent = device._table.on_device(np.zeros(0, np.int64))[0].regret_so_far[torch.from_numpy(slots)].tolist()
    names = ours.input_batch.req_ids
    for name, regret in zip(names, spent, strict=True):
        assert regret == pytest.approx(getattr(theirs.requests[name], v1_cpu.STATE).regret, rel=1e-6)
        assert regret <= extra.get(name, {}).get("cospec_max_regret", np.inf)


@pytest.mark.parametrize("module", [v1_cpu, v1_gpu])
def test_a_server_budget_of_nothing_gives_the_tokens_of_stock_v1(module: Any, tmp_path: Path, one_rank: None) -> None:
    runner, sampler = installed(module, KEEP_ALL, tmp_path, IDS, max_regret=0.0)
    stock = RejectionSampler(Sampler())
    for seed in range(8):
        step = Step(seed, IDS, sampled=0.5)
        torch.manual_seed(seed)
        want = stock(step.metadata(), step.draft_probabilities, step.logits.clone(), step.sampling())
        assert torch.equal(runner.run(sampler, step), want.sampled_token_ids), seed


@pytest.mark.parametrize("module", [v1_cpu, v1_gpu])
def test_a_preempted_request_keeps_what_it_has_spent(module: Any, tmp_path: Path, one_rank: None) -> None:
    """Two slots for three requests: one leaves the batch, another takes its slot, then the first comes back."""
    budget, given_up = 2.0, 0.0
    runner, sampler = installed(
        module, KEEP_ALL, tmp_path, ["a", "b", "c"], {"a": {"cospec_max_regret": budget}}, size=2
    )
    visits = set()
    for seed in range(12):
        ids = [["a", "b"], ["c", "b"], ["c", "b"]][seed % 3]
        step = Step(seed, ids, sampled=0.0, junk=False)
        runner.run(sampler, step)
        for decision in sampler.take_decisions():
            if decision.request_id == "a" and decision.kept:
                row = step.logits[decision.block_position]  # "a" comes first in its batches
                given_up += float(row.max() - row[step.drafts[decision.block_position]])
                visits.add(seed)
    assert len(visits) > 1
    assert budget / 2 < given_up <= budget
