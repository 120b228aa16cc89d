"""Intervals and paired tests, against scipy and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from vllm_cospec.training.measure.intervals import bootstrap_difference, mcnemar, paired_difference, wilson_interval


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (3, 10), (812, 1000), (1, 1)])
def test_wilson_equals_scipys(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (30, 12), (900, 10), (3, 40)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_the_paired_interval_covers_the_true_difference() -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        both = generator.random(150)
        ours, theirs = (both < 0.6).astype(float), ((both > 0.05) & (both < 0.5)).astype(float)
        mean, (low, high) = paired_difference(ours, theirs)
        assert low <= mean <= high
        covered += low <= 0.15 <= high
    assert covered >= 0.92 * 400


def test_equal_answers_still_leave_an_interval() -> None:
    mean, (low, high) = paired_difference(np.ones(50), np.ones(50))
    assert mean == 0
    assert low < 0 < high


def test_the_bootstrap_interval_is_scipys() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.choice([0.0, 0.5, 1.0], 300), rng.choice([0.0, 1.0], 300)
    expected = bootstrap((ours - theirs,), np.mean, method="percentile", n_resamples=10_000, rng=rng)
    assert bootstrap_difference(ours, theirs) == pytest.approx(tuple(expected.confidence_interval), abs=0.006)
    assert bootstrap_difference(ours, ours) == (0.0, 0.0)
