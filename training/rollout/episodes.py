"""Episodes: what rollouts bring home, as arrays. Imports no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Episodes:
    """E responses with M decisions in all, and B branches. Arrays, so that they travel cheaply."""

    problem: np.ndarray  # [E] int64, number within the iteration
    reward: np.ndarray  # [E] float64, the task's
    tokens: np.ndarray  # [E] int64
    steps: np.ndarray  # [E] int64, of the target
    capped: np.ndarray  # [E] bool, ended by max_tokens
    texts: list[str]
    episode: np.ndarray  # [M] int64
    statistics: np.ndarray  # [M, 16] float32
    kept: np.ndarray  # [M] bool
    probability: np.ndarray  # [M] float64, of keeping, when it was decided
    output_position: np.ndarray  # [M] int64
    branch_decision: np.ndarray  # [B] int64, which decision
    branch_keep: np.ndarray  # [B] float64, return when its draft token is kept
    branch_drop: np.ndarray  # [B] float64, return when it is not
    drafts: int = 0  # blocks verified, as vLLM counts
    accepted: int = 0  # draft tokens kept in them
    generated_tokens: int = 0  # branches included
    generating_s: float = 0.0
    busy_s: float = 0.0

    @staticmethod
    def merge(parts: list[Episodes]) -> Episodes:
        """Put parts end to end; indices are moved along."""
        if not parts:
            empty = np.zeros(0, np.int64)
            return Episodes(
                empty, np.zeros(0), empty, empty, np.zeros(0, bool), [], empty, np.zeros((0, 16), np.float32),
                np.zeros(0, bool), np.zeros(0), empty, empty, np.zeros(0), np.zeros(0),
            )  # fmt: skip
        episodes = np.cumsum([0, *(len(p.problem) for p in parts)])
        decisions = np.cumsum([0, *(len(p.kept) for p in parts)])

        def joined(name: str, offsets: np.ndarray | None = None) -> np.ndarray:
            arrays = [getattr(p, name) for p in parts]
            return np.concatenate(arrays if offsets is None else [a + o for a, o in zip(arrays, offsets, strict=False)])

        return Episodes(
            joined("problem"), joined("reward"), joined("tokens"), joined("steps"),
            joined("capped"), [text for p in parts for text in p.texts],
            joined("episode", episodes), joined("statistics"), joined("kept"),
            joined("probability"), joined("output_position"), joined("branch_decision", decisions),
            joined("branch_keep"), joined("branch_drop"),
            *(sum(getattr(p, name) for p in parts)
              for name in ("drafts", "accepted", "generated_tokens", "generating_s", "busy_s")),
        )  # fmt: skip


def saved(steps: Any, tokens: Any) -> Any:
    """Share of target steps saved, 1 - steps / tokens, in [0, 1)."""
    return 1 - steps / np.maximum(tokens, 1)
