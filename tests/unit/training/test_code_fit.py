"""Arbiters fitted without reinforcement learning."""

from __future__ import annotations

import pytest
import torch
from artefacts import some_statistics

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels.statistics import NUM_STATISTICS
from vllm_cospec.training.learning.linear import linear_arbiter
from vllm_cospec.training.pairs.code.fit import fit_logistic, quality


def test_a_linear_function_fits_into_the_shape_of_an_arbiter() -> None:
    weights, bias = torch.randn(NUM_STATISTICS, generator=torch.manual_seed(1)), torch.tensor(0.3)
    arbiter = linear_arbiter(weights, bias, (4, 3))
    x = torch.randn(50, NUM_STATISTICS, generator=torch.manual_seed(2))
    torch.testing.assert_close(arbiter.logit(x), x @ weights + bias)


def test_a_logistic_regression_finds_what_decides() -> None:
    statistics = torch.randn(4000, NUM_STATISTICS, generator=torch.manual_seed(3)) * 5 + 7
    labels = torch.where(statistics[:, 2] - statistics[:, 5] > 1, 1.0, -1.0)
    like = Arbiter((8, 8))
    like.mean.copy_(statistics.mean(0))
    like.scale.copy_(statistics.std(0))
    found = quality(fit_logistic(like, statistics, labels), statistics, labels)
    assert found["right"] > 0.99
    assert found["always_target"] == pytest.approx(float((labels < 0).float().mean()))


def test_quality_of_an_arbiter_that_always_takes_the_target() -> None:
    arbiter = linear_arbiter(torch.zeros(NUM_STATISTICS), torch.tensor(-2.0), (2, 2))
    x = some_statistics()
    labels = torch.ones(len(x))
    labels[: len(x) // 4] = -1
    found = quality(arbiter, x, labels)
    assert found["right"] == found["always_target"] == pytest.approx((len(x) // 4) / len(x))
