"""What an arbiter does at every threshold, from as few responses as can tell.

A threshold decides by comparing scores with it, so one response is the response at every threshold that lies between
the largest score it turned down and the smallest it kept. Problems are answered at the strictest threshold first,
then at the next one that would decide something else, and so on: most have two or three different responses over the
whole range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.outcome import Outcome
from vllm_cospec.training.rollout.engine import Request, Response

WAVE = 512  # requests handed to the engine at once


@dataclass(frozen=True)
class Sweep:
    """The answers to n problems at T thresholds, R responses in all."""

    thresholds: tuple[float, ...]  # from the strictest on
    response: np.ndarray  # [T, n] int64, which response is the answer at a threshold to a problem
    score: np.ndarray  # [R] float64, the task's
    tokens: np.ndarray  # [R] int64
    steps: np.ndarray  # [R] int64, of the target
    capped: np.ndarray  # [R] bool, ended by the longest length allowed
    decisions: Sequence[np.ndarray]  # [R], the arbiter's scores at the mismatches of each response, float32

    @property
    def scores(self) -> np.ndarray:
        """The task's score at each threshold on each problem, float64 [T, n]."""
        return self.score[self.response]

    def steps_saved(self, index: int) -> float:
        """Return the mean share of target steps saved at a threshold, 1 - steps / tokens."""
        own = self.response[index]
        return float(np.mean(1 - self.steps[own] / np.maximum(self.tokens[own], 1)))

    def outcome(self, index: int) -> Outcome:
        """Return the answers at a threshold as one outcome; no time was taken.

        Its acceptance length is of tokens delivered: of a last block that reaches beyond the response's end, only what
        the response got of it counts. A response's first token is the prompt's own and belongs to no block.
        """
        own = self.response[index]
        mismatches, overrides = self.counts(index)
        counts = Counts.of_responses(self.tokens[own], self.steps[own], int(mismatches.sum()), int(overrides.sum()))
        return Outcome(np.arange(len(own)), self.score[own], self.tokens[own], self.capped[own], counts, seconds=0.0)

    def counts(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the mismatches and the overrides of each problem at a threshold, int64 [n] each."""
        own = [self.decisions[number] for number in self.response[index]]
        threshold = np.float32(self.thresholds[index])
        kept = [int((scores > threshold).sum()) for scores in own]
        return np.array([len(scores) for scores in own], np.int64), np.array(kept, np.int64)

    @staticmethod
    def merge(parts: Sequence[Sweep]) -> Sweep:
        """Put sweeps of the same thresholds over different problems side by side."""
        offsets = np.cumsum([0, *(len(part.score) for part in parts)])
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("score", "tokens", "steps", "capped")
        }
        return Sweep(
            thresholds=parts[0].thresholds,
            response=np.concatenate(
                [part.response + offset for part, offset in zip(parts, offsets, strict=False)], axis=1
            ),
            decisions=[scores for part in parts for scores in part.decisions],
            **arrays,
        )


def sweep(
    run: Callable[[list[Request]], list[Response]],
    requests: Sequence[Request],
    thresholds: Sequence[float],
    score: Callable[[int, str], float],
    tick: Callable[[int], None] = lambda count: None,
) -> Sweep:
    """Answer every problem at every threshold.

    Args:
        run: of an engine whose policy is the learned one and which collects.
        requests: one for each problem, without a threshold.
        thresholds: from the strictest on.
        score: called with the number of a problem and the text of a response.
        tick: called with the number of (problem, threshold) pairs that have become known.
    """
    answers = np.full((len(thresholds), len(requests)), -1, np.int64)
    limits = np.array(thresholds, np.float32)  # as they are compared
    found: list[tuple[float, int, int, bool, np.ndarray]] = []
    missing = list(range(len(requests)))
    while missing:
        part, missing = missing[:WAVE], missing[WAVE:]
        places = [int((answers[:, i] >= 0).sum()) for i in part]
        asked = [
            Request(
                requests[i].prompt, requests[i].max_tokens, requests[i].seed, requests[i].temperature,
                requests[i].extra | {"cospec_threshold": float(thresholds[place])}, requests[i].top_p,
            )
            for i, place in zip(part, places, strict=True)
        ]  # fmt: skip
        for i, place, response in zip(part, places, run(asked), strict=True):
            scores = np.array([d.probability for d in response.decisions], np.float32)
            turned_down = max((float(d.probability) for d in response.decisions if not d.kept), default=-1.0)
            reach = place
            while reach < len(thresholds) and (reach == place or limits[reach] >= np.float32(turned_down)):
                answers[reach, i] = len(found)
                reach += 1
            found.append(
                (score(i, response.text), len(response.tokens), len(response.emitted), response.capped, scores)
            )
            tick(reach - place)
            if reach < len(thresholds):
                missing.append(i)
    return Sweep(
        thresholds=tuple(thresholds),
        response=answers,
        score=np.array([row[0] for row in found], np.float64),
        tokens=np.array([row[1] for row in found], np.int64),
        steps=np.array([row[2] for row in found], np.int64),
        capped=np.array([row[3] for row in found], bool),
        decisions=[row[4] for row in found],
    )
