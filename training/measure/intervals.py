"""Intervals and paired tests for accuracies: scipy's where it has them."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binomtest, bootstrap, norm

LEVEL = 0.95
Z = float(norm.ppf((1 + LEVEL) / 2))
RESAMPLES = 10_000


def accuracy_interval(scores: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean score, [n] scores.

    Wilson's score interval where every score is 0 or 1; a bootstrap of the mean where there are others.
    """
    if not len(scores):
        return 0.0, 1.0
    if np.isin(scores, (0.0, 1.0)).all():
        return wilson_interval(int(scores.sum()), len(scores))
    return bootstrap_interval(scores)


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion; n is at least 1."""
    found = binomtest(right, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean, [n] values; seeded, makes no assumption about them."""
    if (values == values[0]).all():  # nothing varies from resample to resample
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def resamples(count: int, number: int) -> np.ndarray:
    """Return numbers below ``count`` drawn with replacement, int64 [number, count]; seeded."""
    return np.random.default_rng(0).integers(0, count, (number, count))


def middle(values: np.ndarray) -> list[float]:
    """Return the middle 95 % of resampled figures."""
    found: list[float] = np.percentile(values, [2.5, 97.5]).tolist()
    return found


def resampled_quotient(ours: np.ndarray, theirs: np.ndarray, number: int) -> tuple[float, list[float]]:
    """Return how many times theirs our rate is, and its 95 % bootstrap interval; the same rows are drawn for both.

    Args:
        ours, theirs: [n, 2] of the same things: what was done, and what it took. A rate is the sum over the sum.
        number: of resamples.
    """
    drawn = resamples(len(ours), number)

    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a[..., 0].sum(-1) / a[..., 1].sum(-1)) / (b[..., 0].sum(-1) / b[..., 1].sum(-1)))

    return float(quotient(ours, theirs)), middle(quotient(ours[drawn], theirs[drawn]))


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return the difference of two mean scores on the same problems and its 95 % interval.

    Agresti and Min's adjustment (2005), which scipy does not have: half a pair is added to each of the four outcomes,
    so that the interval does not vanish where no pair differs.

    Args:
        ours, theirs: scores in [0, 1], [n] each.
    """
    n, difference = len(ours), ours - theirs
    mean = float(difference.mean())
    total, squares = float(difference.sum()), float((difference**2).sum()) + 1.0
    adjusted = total / (n + 2)
    half = Z * math.sqrt(max(0.0, squares / (n + 2) - adjusted**2) / (n + 2))
    return mean, (max(-1.0, min(mean, adjusted - half)), min(1.0, max(mean, adjusted + half)))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: a binomial test with probability 1/2."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
