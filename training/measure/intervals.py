"""Intervals and paired tests for accuracies."""

from __future__ import annotations

import math

import numpy as np

Z = 1.959964  # of a two-sided 95 % interval


def wilson_interval(correct: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + Z * Z / n)), min(1.0, (centre + half) / (1 + Z * Z / n))


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return the difference of two mean scores on the same problems and its 95 % interval.

    Agresti and Min's adjustment (2005): half a pair is added to each of the four outcomes, so that the interval does
    not vanish where no pair differs.

    Args:
        ours, theirs: scores in [0, 1], [n] each.
    """
    n, difference = len(ours), ours - theirs
    mean = float(difference.mean())
    total, squares = float(difference.sum()), float((difference**2).sum()) + 1.0
    adjusted = total / (n + 2)
    half = Z * math.sqrt(max(0.0, squares / (n + 2) - adjusted**2) / (n + 2))
    return mean, (max(-1.0, min(mean, adjusted - half)), min(1.0, max(mean, adjusted + half)))


def bootstrap_difference(ours: np.ndarray, theirs: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the difference of two mean scores on the same problems.

    Problems are resampled, with both of their scores; seeded. Makes no assumption about what a score is.

    Args:
        ours, theirs: scores, [n] each.
        resamples: number of resamples.
    """
    difference = ours - theirs
    values, counts = np.unique(difference, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(difference), counts / len(difference), size=resamples)
    low, high = np.percentile(drawn @ values / len(difference), (2.5, 97.5))
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: a binomial test with probability 1/2."""
    n, smaller = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(smaller + 1)
    )
    return min(1.0, 2 * tail)
