"""What the fused kernels decide and emit, against the reference and stock V2."""

from __future__ import annotations

import arbitration_cases as cases
import numpy as np
import pytest
import torch

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.drift import histogram
from vllm_cospec.kernels.policies import Policy
from vllm_cospec.kernels.scores import SCORE_EDGES


def check(case: cases.Case, policy: Policy, network: Arbiter | None = None) -> int:
    """Compare a batch with reference and stock; returns how many requests were unambiguous."""
    want = cases.expected(case, policy, network)
    got, counters, slots = case.ours(policy, network, collect=True)
    assert got.trace is not None
    emitted = case.stock(cases.pushed(case, [r.num_accepted for r in want.results]))
    compared, per_position, mismatches = 0, [0] * case.num_speculative_steps, 0
    for request, result in enumerate(want.results):
        if want.ambiguous[request]:
            continue
        compared += 1
        start, count = case.starts[request], int(got.num_sampled[request])
        assert count == result.num_accepted + 1, request
        assert count == int(emitted[1][request]), request
        assert got.sampled[request, :count].tolist() == emitted[0][request, :count].tolist(), request
        slot = case.slot[request]
        assert int(slots.overrides_so_far[slot]) == int(case.slots.overrides_so_far[slot]) + len(result.overrides)
        found = len(result.mismatches) * int(case.slots.arbitrated[slot])
        assert int(slots.stops[slot]) == int(case.slots.stops[slot]) + found - len(result.overrides)
        # float32 sums, exact within a budget
        spent = float(case.slots.regret_so_far[slot]) + result.regret
        limited = bool(case.slots.max_regret[slot].isfinite())
        assert float(slots.regret_so_far[slot]) == (spent if limited else pytest.approx(spent, rel=1e-6))
        assert case.slots.scores is not None
        assert slots.scores is not None
        own = []
        if policy.arbiter is not None and network is not None:
            own = [float(network(statistics[None])[0]) for statistics in result.statistics]
        bins = torch.from_numpy(histogram(np.array(own, np.float32))).to(torch.int32)
        assert int((slots.scores[slot] - case.slots.scores[slot]).sum()) == len(own)
        if all(abs(score - edge) > 1e-6 + 1e-3 * edge for score in own for edge in SCORE_EDGES):
            assert (slots.scores[slot] - case.slots.scores[slot]).tolist() == bins.tolist()
        consulted = [i for i in range(case.num_drafts[request]) if int(got.trace.action[start + i]) >= 0]
        assert len(consulted) == len(result.statistics)
        assert [i for i in consulted if int(got.trace.action[start + i]) == 1] == result.overrides
        for position, statistics in zip(consulted, result.statistics, strict=True):
            # float32 sums over at most 151,936 terms: a relative 1e-4 leaves a factor of ten
            torch.testing.assert_close(got.trace.statistics[start + position], statistics, rtol=1e-4, atol=2e-4)
        for position in result.overrides:
            per_position[position] += 1
        mismatches += found
    if compared == len(want.results):
        assert counters.tolist() == [*per_position, mismatches]
    return compared
