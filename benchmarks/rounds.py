"""What interleaved rounds add up to: a row per mode, ratios of speed within rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t

from vllm_cospec.training.measure.outcome import Outcome, table_of

BASES = ("target", "standard")

Rounds = Mapping[str, Sequence[Outcome]]  # by mode


def rows(rounds: Rounds) -> list[dict[str, Any]]:
    """Return a row for every mode that finished a round, paired with the target's."""
    found = table_of({mode: Outcome.merge(own) for mode, own in rounds.items() if own}, "target")
    for row in found:
        row["rounds_tokens_per_s"] = [outcome.tokens_per_s for outcome in rounds[row["mode"]]]
    return found


def finished(rounds: Rounds) -> int:
    """Return the number of rounds that every mode has finished."""
    return min(len(own) for own in rounds.values())


def quotients(rounds: Rounds, mode: str, base: str) -> list[float]:
    """Return how many times as many tokens per second as ``base`` a mode made, in each round that both finished."""
    pairs = zip(rounds[mode], rounds.get(base, ()), strict=False)
    return [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]


def mean_quotient(found: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of the geometric mean of quotients of rounds, by Student's t of their logarithms.

    None where there are fewer than two rounds.
    """
    if len(found) < 2:
        return None
    logarithms = np.log(found)
    half = float(t.ppf(0.975, len(found) - 1) * logarithms.std(ddof=1) / np.sqrt(len(found)))
    return [float(np.exp(logarithms.mean() + sign * half)) for sign in (-1, 1)]


def ratios(rounds: Rounds) -> list[str]:
    """Return how much faster each mode is than ``target`` and ``standard``: medians of ratios within rounds."""
    lines = []
    for base in BASES:
        for mode in rounds:
            found = [] if mode in (base, "target") else quotients(rounds, mode, base)
            if found:
                spread = f" ({min(found):.2f} to {max(found):.2f} in {len(found)} rounds)"
                lines.append(f"{mode} / {base}: {statistics.median(found):.2f}{spread} tokens per second")
    return lines
