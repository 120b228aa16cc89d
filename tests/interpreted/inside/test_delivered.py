"""What cannot reach a response is neither kept nor counted, in the kernels and on both paths of Model Runner V1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import arbitration_cases as cases
import pytest
from v1_cases import IDS, Step, installed

from vllm_cospec.kernels.policies import Random
from vllm_cospec.metrics import Counters
from vllm_cospec.runners import v1_cpu, v1_gpu

pytestmark = pytest.mark.usefixtures("poison")

KEEP_ALL = Random(rate=1.0)


@pytest.mark.parametrize("limit", [0, 2])
def test_the_kernels_count_up_to_the_last_position_that_can_be_delivered(limit: int) -> None:
    case = cases.make_case(5, requests=5, regime="plain", separate=False, arbitrated=1.0, agreement=0.3)
    _, free, _ = case.ours(KEEP_ALL)
    rows = case.rows()
    rows = replace(rows, undeliverable=rows.step >= limit)
    got, counters, slots = case.ours(KEEP_ALL, rows=rows)
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
