"""Intervals and paired tests, against their formulas and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from vllm_cospec.training.measure.intervals import accuracy_interval, bootstrap_interval, mcnemar, paired_difference


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (3, 10), (812, 1000), (1, 1)])
def test_right_and_wrong_have_wilsons_interval(correct: int, n: int) -> None:
    z, p = 1.959964, correct / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    scores = (np.arange(n) < correct).astype(float)
    assert accuracy_interval(scores) == pytest.approx(expected, abs=1e-6)


def test_no_answer_says_nothing() -> None:
    assert accuracy_interval(np.zeros(0)) == (0.0, 1.0)


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


def test_the_bootstrap_interval_covers_the_true_mean() -> None:
    generator, covered = np.random.default_rng(4), 0
    for _ in range(60):
        low, high = bootstrap_interval(generator.choice([0.0, 0.5, 1.0], 200, p=[0.5, 0.3, 0.2]))
        covered += low <= 0.35 <= high
    assert covered >= 0.85 * 60
    scores = generator.choice([0.0, 0.5, 1.0], 300)
    assert bootstrap_interval(scores) == bootstrap_interval(scores)
    assert bootstrap_interval(np.full(9, 0.25)) == (0.25, 0.25)
