"""vLLM 0.33's own ``fly`` against ours, decision by decision; needs 0.33, see ``make compat``."""

from __future__ import annotations

import inspect
from typing import Any

import arbitration_cases as cases
import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.policies import Fly

pytestmark = pytest.mark.skipif(
    "fly_window_size" not in inspect.signature(rejection_sample).parameters, reason="this vLLM has no fly of its own"
)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("sampled", [0.0, 0.5])
@pytest.mark.parametrize("regime", ["plain", "masked"])
def test_fly_defers_where_vllms_own_does(window: int, sampled: float, regime: str) -> None:
    policy = Fly(entropy_top_k=3, entropy_threshold=0.2, window=window)
    fly: dict[str, Any] = {"fly_window_size": window, "fly_entropy_threshold": 0.2, "fly_entropy_top_k": 3}
    overrides = 0
    for seed in range(6 * window):  # the longer the run that has to follow, the rarer it is
        case = cases.make_case(
            seed, requests=6, k=6, regime=regime, sampled=sampled, agreement=0.75, arbitrated=1.0, full=seed % 2 == 0
        )
        case.slots.max_overrides.fill_(UNLIMITED)
        case.slots.exact_tokens.zero_()
        case.slots.arbitrated.fill_(1)
        cu, slot, expanded, local = case.layout()
        theirs, num_theirs = rejection_sample(
            case.processed, case.draft, case.draft_sampled, cu, case.pos, slot, expanded, local,
            case.temperature, case.seed, case.num_speculative_steps,
            **fly,
        )  # fmt: skip
        ours, counters, _ = case.ours(policy)
        assert torch.equal(ours.num_sampled.long(), num_theirs.long()), seed
        for request, count in enumerate(num_theirs.tolist()):
            assert ours.sampled[request, :count].tolist() == theirs[request, :count].tolist(), (seed, request)
        overrides += int(counters[:-1].sum())
    assert overrides > 3, "nothing was deferred: the test shows nothing"
