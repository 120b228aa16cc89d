"""The outcome of a run: what one mode made of some problems, how two are compared, and the figures of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.intervals import accuracy_interval, bootstrap_interval, mcnemar, paired_difference


@dataclass(frozen=True)
class Outcome:
    """n answers of one mode. Outcomes of rounds or parts are merged."""

    problem: np.ndarray  # [n] int64, its number; one may have been asked more than once
    scores: np.ndarray  # [n] float64
    tokens: np.ndarray  # [n] int64, of the answer
    capped: np.ndarray  # [n] bool, ended by the longest length allowed
    counts: Counts
    seconds: float
    arrivals: Sequence[Sequence[float]] = field(default_factory=list)
    """Of each answer that was streamed: seconds from sending it to each piece of text."""
    failures: Sequence[str] = ()
    """A sentence about each answer whose grader failed; it scored 0."""

    @staticmethod
    def merge(parts: Sequence[Outcome]) -> Outcome:
        """Put parts end to end."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("problem", "scores", "tokens", "capped")
        }
        return Outcome(
            **arrays,
            counts=sum((part.counts for part in parts), Counts()),
            seconds=sum(part.seconds for part in parts),
            arrivals=[times for part in parts for times in part.arrivals],
            failures=[text for part in parts for text in part.failures],
        )

    def first_scores(self) -> dict[int, float]:
        """Return the score of each problem, as it was answered first: rounds that repeat problems say nothing new."""
        found: dict[int, float] = {}
        for number, score in zip(self.problem.tolist(), self.scores.tolist(), strict=True):
            found.setdefault(number, score)
        return found

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second; 0 where no time was taken."""
        return float(self.tokens.sum()) / self.seconds if self.seconds else 0.0

    def figures(self) -> dict[str, Any]:
        """Return what JSON and tables show of it. A time nothing was measured for is None."""
        scores = np.array(list(self.first_scores().values()))
        return {
            "num_problems": len(scores),
            "accuracy": float(scores.mean()) if len(scores) else 0.0,
            "accuracy_ci95": list(accuracy_interval(scores)),
            "acceptance_length": self.counts.acceptance_length,
            "acceptance_per_position": self.counts.acceptance_per_position,
            "num_mismatches": self.counts.mismatches,
            "num_overrides": self.counts.overrides,
            "override_rate": self.counts.override_rate,
            "mean_output_tokens": float(self.tokens.mean()) if len(self.tokens) else 0.0,
            "length_cap_hits": int(self.capped.sum()),
            "grader_failures": len(self.failures),
            "tokens_per_s": self.tokens_per_s,
            "requests_per_s": len(self.tokens) / self.seconds if self.seconds else 0.0,
            **self._times(),
        }

    def _times(self) -> dict[str, float | None]:
        streamed = [(times, int(count)) for times, count in zip(self.arrivals, self.tokens, strict=False) if times]
        gaps = [gap for times, _ in streamed for gap in np.diff(times)]
        per_token = [(times[-1] - times[0]) / (n - 1) for times, n in streamed if len(times) > 1 and n > 1]
        return {
            "ttft_ms_p50": _percentile([times[0] for times, _ in streamed], 50),
            "tpot_ms_p50": _percentile(per_token, 50),
            "itl_ms_p99": _percentile(gaps, 99),
        }


def compare(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Return how scores differ on the problems both have answered, paired: difference, intervals, McNemar's test."""
    our_scores, their_scores = ours.first_scores(), theirs.first_scores()
    common = [number for number in our_scores if number in their_scores]
    one = np.array([our_scores[number] for number in common])
    two = np.array([their_scores[number] for number in common])
    if not common:
        return {"difference": 0.0, "ci95": [-1.0, 1.0], "bootstrap_ci95": [-1.0, 1.0], "gained": 0, "lost": 0,
                "p_value": 1.0}  # fmt: skip
    return {**paired_figures(one, two), "bootstrap_ci95": list(bootstrap_interval(one - two))}


def paired_figures(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Return how two scores of the same problems, float64 [n] each, differ: difference, interval, McNemar's test."""
    difference, interval = paired_difference(ours, theirs)
    return {"difference": difference, "ci95": list(interval), **changes(ours, theirs)}


def changes(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Return on how many of the same problems the first scores higher, and lower, float64 [n] each; McNemar's test."""
    gained, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
    return {"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost)}


def table_of(outcomes: Mapping[str, Outcome], baseline: str | None = None) -> list[dict[str, Any]]:
    """Return a row of figures for each mode, paired with the baseline's.

    Args:
        outcomes: by mode.
        baseline: the mode the others are compared with; None, or one that is not there, for no comparison.
    """
    base = outcomes.get(baseline) if baseline is not None else None
    return [
        {
            "mode": mode,
            **own.figures(),
            "paired_vs_target": None if base is None or own is base else compare(own, base),
        }
        for mode, own in outcomes.items()
    ]


def _percentile(seconds: Sequence[float], percent: float) -> float | None:
    """Return a percentile in milliseconds; None of nothing."""
    return float(np.percentile(seconds, percent)) * 1e3 if len(seconds) else None
