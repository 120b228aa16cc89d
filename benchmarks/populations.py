"""Populations of problems whose scores at every threshold are known: there a calibration's statement can be checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.measure.thresholds import Sweep


@dataclass(frozen=True)
class Population:
    """P kinds of problems; those of a kind have the same scores at all T thresholds."""

    name: str
    thresholds: tuple[float, ...]  # from the strictest on, which keeps nothing
    acceptance_length: np.ndarray  # [T]
    scores: np.ndarray  # [P, T], from 0 to 1
    problems: np.ndarray  # [P] int64, how many are of each kind

    @property
    def shares(self) -> np.ndarray:
        """Share of each kind, [P]."""
        return self.problems / self.problems.sum()

    @property
    def loss(self) -> np.ndarray:
        """The true loss of each threshold, [T]: strict's mean score less its own."""
        accuracy = self.shares @ self.scores
        return accuracy[0] - accuracy

    def draw(self, sets: int, n: int, seed: int) -> np.ndarray:
        """Return how many problems of each kind are in random sets of n problems, int64 [sets, P]."""
        return np.random.default_rng(seed).multinomial(n, self.shares, size=sets)

    def split(self, parts: int, seed: int) -> list[np.ndarray]:
        """Return disjoint random parts of equal size of the problems themselves, each int64 [P]."""
        kinds = np.repeat(np.arange(len(self.problems)), self.problems)
        np.random.default_rng(seed).shuffle(kinds)
        size = len(kinds) // parts
        return [np.bincount(kinds[i * size : (i + 1) * size], minlength=len(self.problems)) for i in range(parts)]


def of_sweep(name: str, found: Sweep) -> Population:
    """Return the population of problems that were answered at every threshold."""
    kinds, problems = np.unique(found.scores.T, axis=0, return_counts=True)
    length = [found.outcome(i).counts.acceptance_length for i in range(len(found.thresholds))]
    return Population(name, found.thresholds, np.array(length), kinds, problems)


def of_lines(name: str, rows: Mapping[float, Sequence[Mapping[str, Any]]]) -> Population:
    """Return the population of a code base's lines.

    Args:
        name: of the population.
        rows: what is kept of the answers at each threshold to the same lines, see `benchmarks.natural.entry`; strict's
            are those at 1.
    """
    thresholds = tuple(sorted(rows, reverse=True))
    scores = np.array([[float(row["right"]) for row in rows[threshold]] for threshold in thresholds])
    kinds, problems = np.unique(scores.T, axis=0, return_counts=True)
    length = []
    for threshold in thresholds:
        tokens, steps = (np.array([row[key] for row in rows[threshold]], np.int64) for key in ("tokens", "steps"))
        length.append(Counts.of_responses(tokens, steps).acceptance_length)
    return Population(name, thresholds, np.array(length), kinds, problems)


def save(path: Path, population: Population, **facts: Any) -> None:
    """Write a population whose scores are 0 and 1."""
    rows = ["".join("01"[int(score)] for score in row) for row in population.scores]
    write_result(path, facts | {
        "name": population.name, "thresholds": population.thresholds,
        "acceptance_length": [round(float(length), 4) for length in population.acceptance_length],
        "right_at_each_threshold": dict(zip(rows, population.problems.tolist(), strict=True)),
    })  # fmt: skip


def load(path: Path) -> Population:
    """Read what :func:`save` wrote."""
    found = json.loads(path.read_text())
    kinds = found["right_at_each_threshold"]
    return Population(
        found["name"],
        tuple(found["thresholds"]),
        np.array(found["acceptance_length"]),
        np.array([[float(digit) for digit in row] for row in kinds]),
        np.array(list(kinds.values())),
    )


def flat(num_thresholds: int, loss: float, discordant: float, credit: float = 1.0) -> Population:
    """A population made to break a bound: every threshold loses the same, each on problems of its own.

    Args:
        num_thresholds: besides strict.
        loss: of each of them.
        discordant: share of the problems each of them answers differently from strict.
        credit: how much a different answer changes the score; below 1 for partial credit.
    """
    lost, gained = (discordant + loss / credit) / 2, (discordant - loss / credit) / 2
    own = np.array([[0.5 - credit / 2], [0.5 + credit / 2]])
    scores, shares = [np.full(num_thresholds + 1, 0.5 + credit / 2), np.full(num_thresholds + 1, 0.5 - credit / 2)], []
    for t in range(num_thresholds):
        for share, (strict, other) in ((lost, (own[1], own[0])), (gained, (own[0], own[1]))):
            row = np.full(num_thresholds + 1, float(strict[0]))
            row[t + 1] = other[0]
            scores.append(row)
            shares.append(share)
    rest = 1 - sum(shares)
    problems = np.array([rest / 2, rest / 2, *shares]) * 1e9
    thresholds = tuple(float(t) for t in np.linspace(1, 0, num_thresholds + 1))
    length = np.linspace(5.0, 6.0, num_thresholds + 1)
    name = "made to break a bound" + (", partial credit" if credit < 1 else "")
    return Population(name, thresholds, length, np.array(scores), np.round(problems).astype(np.int64))
