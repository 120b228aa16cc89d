"""What was counted of requests up to a step: a table, of which a request's row is read when it ends."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_cospec.kernels.scores import NUM_BINS
from vllm_cospec.reports import COUNTS, StepCounts, attach, take_in
from vllm_cospec.runners.slots import Spent


def test_a_slot_s_counts_are_those_of_the_request_in_it_when_they_were_noted() -> None:
    spent = Spent(3, torch.device("cpu"), scores=True)
    spent.overrides.copy_(torch.tensor([1, 2, 3]))
    spent.stops.copy_(torch.tensor([10, 20, 30]))
    spent.regret.copy_(torch.tensor([0.5, 0.25, 8.0]))
    assert spent.scores is not None
    spent.scores[2, 4] = 7
    read = spent.counts({"one": 2, "two": 0})
    spent.overrides.fill_(99)  # the next step
    step = read()
    found = step.of("one")
    assert found is not None
    assert (found.mismatches, found.overrides, found.regret) == (33, 3, 8.0)
    assert found.scores.tolist() == [7 if i == 4 else 0 for i in range(NUM_BINS)]
    two = step.of("two")
    assert two is not None
    assert (two.mismatches, two.overrides, two.regret) == (11, 1, 0.5)
    assert step.of("three") is None


def test_without_scores_there_are_none() -> None:
    found = Spent(2, torch.device("cpu"), scores=False).counts({"own": 1})().of("own")
    assert found is not None
    assert found.scores.shape == (0,)


@pytest.mark.parametrize("known", [True, False])
def test_the_scheduler_keeps_a_step_s_table_with_its_requests(known: bool) -> None:
    place = {"own": 0} if known else {}
    step = StepCounts(place, np.array([3]), np.array([1]), np.array([0.5]), np.zeros((1, 0), np.int64))
    output = attach(SimpleNamespace(req_ids=["own", "ended meanwhile"]), lambda: step)
    metrics = SimpleNamespace(histogram=[4, 5, 6], num_spec_tokens=2)
    request = SimpleNamespace(spec_decode_metrics=metrics)
    take_in(output, {"own": request})
    assert getattr(request, COUNTS, None) is (step if known else None)
    assert metrics.histogram == [4, 5, 6, *([3, 1, 512] if known else [])]
