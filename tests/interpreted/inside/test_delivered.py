"""What cannot reach a response is neither kept nor counted, in the kernels and on both paths of Model Runner V1."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import arbitration_cases as cases
import pytest
import torch
from v1_cases import IDS, Step, installed

from vllm_cospec.kernels.policies import Random
from vllm_cospec.kernels.reach import STOPS, undeliverable
from vllm_cospec.kernels.triton.layout import NO_DRAFT, ROW_FIELDS, STATUS
from vllm_cospec.kernels.triton.workspace import Workspace
from vllm_cospec.metrics import Counters
from vllm_cospec.runners import v1_cpu, v1_gpu

pytestmark = pytest.mark.usefixtures("poison")

KEEP_ALL = Random(rate=1.0)


@pytest.mark.parametrize("limit", [0, 2])
def test_the_kernels_count_up_to_the_last_position_that_can_be_delivered(limit: int) -> None:
    case = cases.make_case(5, requests=5, regime="plain", separate=False, arbitrated=1.0, agreement=0.3)
    _, free, _ = case.ours(KEEP_ALL)
    first, request_slot, _, _ = case.layout()
    begins = case.pos[first[:-1].long()] + 1 - case.slots.response_start[request_slot]
    case.slots.ends[request_slot, 0] = (begins + limit).to(torch.int32)
    got, counters, slots = case.ours(KEEP_ALL)
    k = case.num_speculative_steps
    assert counters[:limit].tolist() == free[:limit].tolist()
    assert counters[limit:k].tolist() == [0] * (k - limit)
    assert int(counters[k]) >= int(counters[:k].sum())
    assert int(slots.overrides_so_far.sum() - case.slots.overrides_so_far.sum()) == int(counters[:k].sum())
    assert int(free[limit:k].sum()) > 0
    if limit == 0:
        sampled, num_sampled = case.stock()
        assert int(counters[k]) == 0
        assert got.num_sampled.tolist() == num_sampled.tolist()
        for request, count in enumerate(num_sampled.tolist()):
            assert got.sampled[request, :count].tolist() == sampled[request, :count].tolist()


@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_kernels_find_what_cannot_be_delivered_as_it_is_defined(k: int) -> None:
    """The definition is :func:`vllm_cospec.kernels.reach.undeliverable`; a row's status says what the kernel found."""
    found = []
    for seed in range(4):
        case = cases.make_case(seed, k=k, requests=6, arbitrated=1.0, agreement=0.3)
        first, request_slot, slot, step = case.layout()
        begins = case.pos[first[:-1].long()] + 1 - case.slots.response_start[request_slot]
        case.slots.ends[request_slot, 0] = (begins + torch.tensor([0, 1, k, k, 99, 99])).to(torch.int32)
        for request in (
            3,
            5,
        ):  # two drafts end the response, wherever they stand; the first token of a block is no draft
            own = case.draft_sampled[case.starts[request] : case.starts[request + 1]]
            case.slots.ends[request_slot[request], [1, STOPS]] = own[[0, len(own) // 2]]
        space = Workspace(cases.CPU, case.raw.shape[1], len(case.raw), 6)
        case.ours(KEEP_ALL, space=space)
        rows, drafts = len(case.raw), torch.ones(len(case.raw), dtype=torch.bool)
        drafts[first[1:].long() - 1] = False  # the rows behind the last draft
        status = space.rows[: rows * ROW_FIELDS.value].view(rows, ROW_FIELDS.value)[drafts, STATUS.value]
        position = case.pos + 1 - case.slots.response_start[slot]
        expected = undeliverable(case.draft_sampled, step, position, case.slots.ends[slot])
        none = case.draft_sampled.roll(-1) < 0
        assert (status == NO_DRAFT.value).tolist() == (expected | none)[drafts].tolist()
        found += expected[drafts].tolist()
    assert True in found
    assert False in found


def test_on_v1_both_paths_stop_counting_where_a_response_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(is_first_rank=True))
    counted = []
    for module in (v1_cpu, v1_gpu):
        runner, sampler = installed(module, KEEP_ALL, tmp_path, [])
        for i, name in enumerate(IDS):
            runner.add(name, 3 + i, max_tokens=3 + 4 * i, stop_token_ids=list(range(8 * i, 8 * i + 8)))
        outputs = [runner.run(sampler, Step(seed, IDS, sampled=0.0)).tolist() for seed in range(4)]
        totals = Counters(str(tmp_path / module.__name__), 0, 4).totals()
        kept = [d for d in sampler.take_decisions() if d.kept]
        assert int(totals.overrides.sum()) == len(kept)
        for decision in kept:
            i = IDS.index(decision.request_id)
            assert decision.output_position < 3 + 4 * i
        counted.append((outputs, totals.mismatches, totals.overrides.tolist()))
    assert counted[0] == counted[1]
    assert 0 < sum(counted[0][2]) <= counted[0][1]
