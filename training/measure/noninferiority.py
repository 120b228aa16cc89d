"""Tests that accuracy is not lost: is the loss below a margin, judged by both answers to the same problems?

The loss is the mean, over the population the problems were drawn from, of strict's score minus ours. The null
hypothesis says that it is the margin or more. Both tests hold their level at every sample size, not only in the
limit:

- *Scores 0 and 1*: the exact unconditional score test for matched pairs (Hsueh, Liu and Chen, Biometrics 57, 2001).
  Only pairs with different scores tell. Its statistic is Tango's (1998), the loss found less the margin over its
  standard deviation where the loss is the margin; its p-value is the probability of a statistic as small or smaller,
  at the worst value of what is not known besides, the share of the pairs that are gained.
- *Scores between 0 and 1*: by betting (Waudby-Smith and Ramdas, JRSS B 86, 2024, arXiv 2010.09686). A gambler who
  bets on "less is lost than the margin" gains nothing on average if the null hypothesis is true, so his capital
  becomes K with probability 1 / K at most; the stakes are their predictable plug-in ones for a sample size known
  beforehand.

Bounds come from the tests: the smallest margin from which on the null hypothesis is rejected.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import betainc, gammaln

RESOLUTION = 1e-4  # of a bound
NUISANCE_POINTS = 97  # where the worst case is looked for; a finer grid follows around the worst of them
STAKE = 0.75  # share of the capital that may be lost in one bet


def p_value(ours: np.ndarray, strict: np.ndarray, margin: float, level: float = 0.95) -> float:
    """Return the p-value of "the loss is ``margin`` or more".

    Args:
        ours, strict: scores from 0 to 1 on the same problems, [n] each.
        margin: from 0 up to but not 1.
        level: of confidence that is wanted; decides the stakes of the test by betting, and is valid whatever it is.

    Raises:
        ValueError: a score lies outside of 0 to 1, or there is none.
    """
    _check(ours, strict)
    if binary(ours) and binary(strict):
        return exact_p_value(int((ours > strict).sum()), int((ours < strict).sum()), len(ours), margin)
    return betting_p_value(ours - strict, margin, level)


def loss_bound(ours: np.ndarray, strict: np.ndarray, level: float) -> float:
    """Return the upper confidence bound of the loss: the smallest margin, to 1e-4, at which the loss is rejected.

    Args:
        ours, strict: scores from 0 to 1 on the same problems, [n] each.
        level: of confidence, one-sided.

    Raises:
        ValueError: a score lies outside of 0 to 1, or there is none.
    """
    _check(ours, strict)

    def rejected(margin: float) -> bool:
        return p_value(ours, strict, margin, level) <= 1 - level

    steps, low = round(1 / RESOLUTION), 0
    while True:
        high = steps
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if rejected(middle * RESOLUTION) else (middle + 1, high)
        # The exact p-value does not fall at every step; a margin above that is not rejected counts.
        above = np.unique(np.linspace(high, min(steps - 1, 1.5 * high + 10), 12).astype(int))
        missed = [step for step in above[above > high] if not rejected(float(step) * RESOLUTION)]
        if not missed:
            return high * RESOLUTION
        low = int(missed[-1]) + 1


@lru_cache(maxsize=4096)
def exact_p_value(gained: int, lost: int, n: int, margin: float) -> float:
    """Return the p-value of the exact unconditional score test.

    Args:
        gained, lost: pairs in which we are right and strict is wrong, and the reverse.
        n: pairs in all.
        margin: see :func:`p_value`.
    """
    at_most = _rejection_region(gained, lost, n, margin)
    top = (1 - margin) / 2  # gained and lost shares add up to 1 at most
    # Equidistant after a variance-stabilising transformation, so that both ends are looked at closely.
    angles = np.linspace(0.0, np.pi / 2, NUISANCE_POINTS)
    for _ in range(2):
        tails = _tails(top * np.sin(angles) ** 2, at_most, n, margin)
        worst, step = angles[tails.argmax()], angles[1] - angles[0]
        angles = np.linspace(max(0.0, worst - step), min(np.pi / 2, worst + step), 17)
    return float(min(1.0, max(tails.max(), _tails(top * np.sin(angles) ** 2, at_most, n, margin).max())))


def score_statistic(gained: np.ndarray | float, lost: np.ndarray | float, n: int, margin: float) -> np.ndarray:
    """Return Tango's statistic of counts of pairs; the smaller, the more it speaks against a loss of ``margin``.

    The share gained at which the variance is taken maximises the likelihood where lost - gained = margin.
    """
    b = gained * (1 - margin) + lost * (1 + margin) - 2 * n * margin
    share = (b + np.sqrt(b * b + 8 * n * gained * margin * (1 - margin))) / (4 * n)
    variance = n * (2 * share + margin - margin * margin)
    found = lost - gained - n * margin
    return np.where(variance > 0, found / np.sqrt(np.where(variance > 0, variance, 1.0)), 0.0)


def betting_p_value(differences: np.ndarray, margin: float, level: float = 0.95) -> float:
    """Return the p-value of the test by betting.

    Args:
        differences: our score minus strict's, from -1 to 1, [n], in an order that does not depend on them.
        margin, level: see :func:`p_value`.
    """
    return math.exp(-_gain((differences + 1) / 2, (1 - margin) / 2, level))


def mean_bound(values: np.ndarray, level: float) -> float:
    """Return the lower confidence bound of a mean, to 1e-4, by the same bets.

    Args:
        values: from 0 to 1, [n], in an order that does not depend on them.
        level: of confidence, one-sided.
    """
    low, high, needed = 0, round(1 / RESOLUTION), -math.log(1 - level)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _gain(values, middle * RESOLUTION, level) >= needed else (low, middle - 1)
    return low * RESOLUTION


def _gain(values: np.ndarray, null: float, level: float) -> float:
    """Logarithm of the largest capital on the way, at least 0, of bets that the mean of values exceeds ``null``."""
    n = len(values)
    rounds = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(values)) / (rounds + 1)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (rounds + 1)
    before = np.concatenate([[0.25], variance[:-1]])  # a stake may depend on what came before only
    stakes = np.minimum(np.sqrt(2 * math.log(1 / (1 - level)) / (n * before)), STAKE / null)
    return max(0.0, float(np.cumsum(np.log1p(stakes * (values - null))).max()))


def _check(ours: np.ndarray, strict: np.ndarray) -> None:
    if len(ours) == 0 or len(ours) != len(strict):
        raise ValueError(f"{len(ours)} scores beside {len(strict)}; both answers to at least one problem are needed")
    for scores in (ours, strict):
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("scores must lie between 0 and 1 for a bound of the loss")


def binary(scores: np.ndarray) -> bool:
    """Return whether every score is 0 or 1."""
    return bool(((scores == 0) | (scores == 1)).all())


def _rejection_region(gained: int, lost: int, n: int, margin: float) -> np.ndarray:
    """For each possible number gained, 0 to n, the largest number lost that speaks as strongly; -1 for none.

    The statistic grows with the number lost, so that it can be bisected.
    """
    found = score_statistic(gained, lost, n, margin) + 1e-9  # ties count, whatever the rounding
    gains = np.arange(n + 1.0)
    low, high = np.full(n + 1, -1.0), n - gains
    while (low < high).any():
        middle = np.ceil((low + high) / 2)
        inside = score_statistic(gains, np.maximum(middle, 0.0), n, margin) <= found
        low, high = np.where(inside, middle, low), np.where(inside, high, middle - 1)
    return low


def _tails(shares: np.ndarray, at_most: np.ndarray, n: int, margin: float) -> np.ndarray:
    """Probability of the rejection region where the loss is the margin, for shares gained [G]: [G]."""
    return np.array([_tail(float(share), at_most, n, margin) for share in shares])


def _tail(share: float, at_most: np.ndarray, n: int, margin: float) -> float:
    spread = 8 * math.sqrt(n * share * (1 - share)) + 8  # beyond it lies less than 1e-12
    gains = np.arange(max(0, int(n * share - spread)), min(n, int(n * share + spread)) + 1.0)
    most, others = at_most[gains.astype(int)], n - gains
    some = most >= 0
    gains, most, others = gains[some], most[some], others[some]
    logs = gammaln(n + 1) - gammaln(gains + 1) - gammaln(others + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = logs + np.where(gains > 0, gains * np.log(share), 0.0) + others * np.log1p(-share)
    lost_share = min(1.0, (share + margin) / (1 - share))
    # the binomial distribution of the number lost among the others, cumulated up to ``most``
    below = np.where(most >= others, 1.0, betainc(np.maximum(others - most, 1e-9), most + 1, 1 - lost_share))
    return float((np.exp(logs) * below).sum())
