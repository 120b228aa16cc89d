"""Which thresholds keep the loss below a margin: fixed-sequence testing (Learn then Test, arXiv 2110.01052).

Thresholds are tested in an order that was fixed before anything was measured, from the strictest on, each at the full
level, and the first that fails ends the sequence. A wrong statement needs the first threshold of the sequence that
really loses the margin or more to pass its own test, so the chance that any statement is wrong is that of one single
test, however many thresholds there are and however the one that is used is chosen among those that passed. Strict
verification is the first of them: it gives the target's tokens, so it loses nothing and passes without a test.

The margin is chosen when a server starts, after the curve was measured; so what is kept of a test is its bound, the
smallest margin at which it passes, and of a sequence the largest bound so far: a threshold passes at every margin
from there on. The statement is about a margin that was not chosen by looking at these bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vllm_cospec.training.measure.noninferiority import loss_bound

STRICT = 1.0  # no score exceeds it: nothing is kept
EVERYTHING = 0.0
ENDS = (STRICT, 0.999, 0.99, 0.95, 0.9, 0.1, 0.05, 0.01, 0.001, 0.0001, EVERYTHING)
"""What a grid is continued with on both sides, so that the best threshold does not lie beyond it."""


def threshold_sequence(thresholds: Iterable[float]) -> tuple[float, ...]:
    """Return the thresholds in the order in which they are tested, with both ends: keep nothing, keep everything."""
    wanted = set(thresholds)
    ends = {end for end in ENDS if not wanted or end > max(wanted) or end < min(wanted)}
    return tuple(sorted(wanted | ends, reverse=True))


def sequence_bounds(scores: np.ndarray, strict: np.ndarray, level: float) -> np.ndarray:
    """Return the smallest margin at which each threshold passes with all before it, [T], never falling.

    Args:
        scores: from 0 to 1, of each threshold on each problem, [T, n], in the order of the sequence.
        strict: of strict verification on the same problems, [n].
        level: of confidence, for example 0.95.

    Raises:
        ValueError: a score lies outside of 0 to 1, or there is none.
    """
    return np.maximum.accumulate([loss_bound(own, strict, level) for own in scores])


def best_passed(
    bounds: Sequence[float] | np.ndarray, scores: np.ndarray, saved: Sequence[float], margin: float, speed_weight: float
) -> int:
    """Return the index of the threshold to serve among those that pass.

    The value of a threshold is its accuracy plus ``speed_weight`` times the steps saved. Where strict verification has
    the highest, it is strict's. Else thresholds whose value is not significantly lower than the highest, by one
    standard error of the paired difference of the scores, count as equally good, and of these the one that saves most
    steps is taken: all of them keep the margin, their scores do not tell them apart, and what they save is known far
    better. It never leaves strict for one that is merely not much worse.

    Args:
        bounds: of strict, which is 0, and of the others from :func:`sequence_bounds`, [T].
        scores: of each threshold on each problem, strict first, [T, n].
        saved: share of target steps saved by each threshold.
        margin: largest loss that is accepted.
        speed_weight: as in training.
    """
    passed = [i for i, bound in enumerate(bounds) if i == 0 or bound <= margin]
    value = scores.mean(axis=1) + speed_weight * np.array(saved)
    best = max(passed, key=lambda i: value[i])  # of equals the strictest
    if best == 0:
        return 0
    ties = [i for i in passed if i and value[best] - value[i] <= _paired_error(scores[best], scores[i])]
    return max(ties, key=lambda i: saved[i])


def _paired_error(first: np.ndarray, second: np.ndarray) -> float:
    """Standard error of the mean difference of two scores on the same problems."""
    return float((first - second).std(ddof=1) / np.sqrt(len(first)))
