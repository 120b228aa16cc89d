"""Is the traffic still what calibration saw? A sequential test over requests, valid however long a server runs.

Each finished request gives a few figures x: its tokens, mismatches per token, overrides per mismatch, and the share of
its scores in each bin of a histogram. They are put on one scale from 0 to 1, the logistic function of (x - m) / s with
the mean m and the standard deviation s of calibration's requests: what hardly varies between problems tells other
traffic by small changes, what varies much by large ones. Calibration leaves, for each of them, a range that the mean on
this scale lies in with high confidence. One gambler bets on every figure that its mean lies above the range, another
that it lies below: at each request his capital is multiplied with 1 + stake x (figure - end of the range), so that on
calibrated traffic nobody gains on average. New gamblers begin with one unit each at every request, since traffic may
change at any time; what all of them own together is a Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo, arXiv
2203.03532). Several stakes are played and averaged, since nobody knows how much will change.

On calibrated traffic the expected sum is the number of requests so far. So the chance of an alarm within the first n
requests is n / ``LIMIT`` at most, however the figures are distributed, plus the chance ``RANGE_ERROR`` that
calibration's ranges are wrong. Requests are taken to be independent of each other; a burst of the same prompt is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from vllm_cospec.kernels.frozen import Frozen
from vllm_cospec.kernels.scores import SCORE_EDGES

_SCORES = 3  # the first figure of the histogram
FIGURES = _SCORES + len(SCORE_EDGES) + 1
LIMIT = 2e6  # 10,000 calibrated requests raise an alarm with a chance of 0.5 % at most
RANGE_ERROR = 0.005
STAKES = np.array([0.03, 0.1, 0.3, 0.6, 0.9])  # shares of the largest stake that cannot ruin a gambler


class Range(Frozen):
    """What calibration saw of one figure x."""

    mean: float = Field(ge=0)
    deviation: float = Field(ge=0)
    """Standard deviation between problems."""
    low: float = Field(ge=0, le=1)
    """The mean of x on the scale of :func:`standardised` is not lower over such requests, with high confidence."""
    high: float = Field(ge=0, le=1)
    """Nor is it higher."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is greater than high {self.high}")
        return self


class Traffic(Frozen):
    """What calibration saw of the requests themselves."""

    requests: int = Field(ge=1)
    tokens: Range
    """Of a response."""
    mismatches_per_token: Range
    overrides_per_mismatch: Range
    scores: tuple[Range, ...] = Field(min_length=len(SCORE_EDGES) + 1, max_length=len(SCORE_EDGES) + 1)
    """Share of a request's scores in each bin of the histogram."""

    @property
    def ranges(self) -> tuple[Range, ...]:
        """All of them, in the order of :meth:`Finished.figures`."""
        return (self.tokens, self.mismatches_per_token, self.overrides_per_mismatch, *self.scores)


@dataclass(frozen=True)
class Finished:
    """What was counted of one request that was verified with the server's own settings."""

    tokens: int
    mismatches: int
    overrides: int
    histogram: np.ndarray  # int64 [bins], of the scores at its mismatches
    whole: bool = True  # a client that gave up has shortened the others

    def figures(self) -> np.ndarray:
        """Return tokens, mismatches per token, overrides per mismatch and the share of each bin, float64 [FIGURES].

        NaN for what a request that was given up, without a mismatch, or without a score, cannot say.
        """
        figures = np.full(FIGURES, np.nan)
        if self.whole:
            figures[0] = self.tokens
        figures[1] = min(1.0, self.mismatches / max(1, self.tokens))
        if self.mismatches:
            figures[2] = min(1.0, self.overrides / self.mismatches)
        if self.histogram.sum():
            figures[_SCORES:] = self.histogram / self.histogram.sum()
        return figures


def figure_name(index: int) -> str:
    """Return what one of :meth:`Finished.figures` is, for messages."""
    if index < _SCORES:
        return ("tokens of a response", "mismatches per token", "overrides per mismatch")[index]
    low, high = (0.0, *SCORE_EDGES)[index - _SCORES], (*SCORE_EDGES, 1.0)[index - _SCORES]
    return f"share of scores from {low:g} to {high:g}"


def histogram(scores: np.ndarray) -> np.ndarray:
    """Count scores by bin, int64 [bins]."""
    return np.bincount(np.searchsorted(SCORE_EDGES, scores, side="right"), minlength=len(SCORE_EDGES) + 1)


def standardised(figures: np.ndarray, mean: np.ndarray | float, deviation: np.ndarray | float) -> np.ndarray:
    """Put figures on the scale they are compared on, from 0 to 1: 1/2 at ``mean``, steeper where they vary less."""
    distance = (figures - mean) / np.maximum(deviation, 1e-9)
    return 1 / (1 + np.exp(-np.clip(distance, -30, 30)))


def bet(capital: np.ndarray, figures: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Let new gamblers in and play one round.

    Args:
        capital: of those who bet on a mean above, and below, [..., 2, stakes, figures].
        figures: of one request, from :func:`standardised`, [..., figures]; NaN where there is no round.
        low, high: the ranges, [figures].

    Returns:
        The capital afterwards.
    """
    stakes, figures = STAKES[:, None], figures[..., None, :]
    above = stakes * (figures / np.maximum(high, 1e-9) - 1)  # a figure of 0 takes the whole stake
    below = stakes * ((1 - figures) / np.maximum(1 - low, 1e-9) - 1)
    after = (capital + 1) * (1 + np.stack([above, below], axis=-3))
    return np.where(np.isnan(after), capital, after)


class DriftDetector:
    """Watches requests one after the other; an alarm stays until :meth:`reset`."""

    def __init__(self, expected: Traffic):
        """Begin with what calibration saw."""
        self._mean = np.array([own.mean for own in expected.ranges])
        self._deviation = np.array([own.deviation for own in expected.ranges])
        self._low = np.array([own.low for own in expected.ranges])
        self._high = np.array([own.high for own in expected.ranges])
        self.reset()

    def reset(self) -> None:
        """Forget all requests, and the alarm."""
        self._capital = np.zeros((2, len(STAKES), FIGURES))
        self.requests, self.alarm = 0, False

    @property
    def evidence(self) -> float:
        """What the gamblers own on average; ``LIMIT`` raises the alarm."""
        return float(self._capital.mean())

    def add(self, request: Finished) -> bool:
        """Take a finished request in; returns whether there is an alarm."""
        self.requests += 1
        if not self.alarm:
            figures = standardised(request.figures(), self._mean, self._deviation)
            self._capital = bet(self._capital, figures, self._low, self._high)
            self.alarm = self.evidence >= LIMIT
        return self.alarm

    def reason(self) -> str:
        """Return which figure speaks most against calibrated traffic, and in which direction."""
        side, _, index = np.unravel_index(self._capital.argmax(), self._capital.shape)
        return f"{figure_name(int(index))} {('above', 'below')[side]} what calibration saw"
