"""The synthetic study of sparse branches measures what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scripts import benchmark

from vllm_cospec.training.config import LearnerConfig
from vllm_cospec.training.learning.learner import Learner

sparse = benchmark("sparse")


def test_as_many_mismatches_are_telling_as_were_asked_for_and_as_the_rule_says() -> None:
    x, difference = sparse.draw(np.random.default_rng(1), 200_000, 0.03)
    assert (difference != 0).mean() == pytest.approx(0.03, abs=0.002)
    strong = sparse.worth(x) > 0.8
    assert difference[strong].sum() / (difference[strong] != 0).sum() == pytest.approx(
        sparse.worth(x)[strong].mean(), abs=0.05
    )


def test_the_share_of_the_gain_is_that_of_the_policy() -> None:
    learner = Learner(LearnerConfig(hidden_sizes=(1,)), 1, 1)
    for bias, expected in ((-9.0, 0.0), (9.0, -1.54)):  # never keeping gains nothing; always keeping costs
        with torch.no_grad():
            learner.arbiter.layers[-1].bias.fill_(bias)  # type: ignore[operator]
        assert sparse.share_of_gain(learner) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("name", sparse.LEARNERS)
def test_a_study_where_all_is_telling_finds_the_rule(name: str) -> None:
    found = sparse.study(sparse.LEARNERS[name], seed=1, telling=1.0, updates=8)
    assert found["labels"] == 8 * 1024
    # weights that shrink need more updates than these, the gradient's most
    assert found["end"] > (0.9 if name in ("policy_gradient", "labels") else 0.8)
