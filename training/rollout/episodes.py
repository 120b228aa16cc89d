"""Episodes: what rollouts bring home, as arrays. Imports no engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_cospec.kernels.statistics import NUM_STATISTICS


def _floats() -> np.ndarray:
    return np.zeros(0)


def _integers() -> np.ndarray:
    return np.zeros(0, np.int64)


def _flags() -> np.ndarray:
    return np.zeros(0, bool)


def _rows() -> np.ndarray:
    return np.zeros((0, NUM_STATISTICS), np.float32)


@dataclass
class Episodes:
    """E responses with M decisions in all, and B branches. Arrays, so that they travel cheaply."""

    problem: np.ndarray = field(default_factory=_integers)  # [E] int64, number within the iteration
    reward: np.ndarray = field(default_factory=_floats)  # [E], the task's
    tokens: np.ndarray = field(default_factory=_integers)  # [E] int64
    steps: np.ndarray = field(default_factory=_integers)  # [E] int64, of the target
    capped: np.ndarray = field(default_factory=_flags)  # [E], ended by max_tokens
    texts: list[str] = field(default_factory=list)
    episode: np.ndarray = field(default_factory=_integers)  # [M] int64
    statistics: np.ndarray = field(default_factory=_rows)  # [M, 16]
    kept: np.ndarray = field(default_factory=_flags)  # [M]
    probability: np.ndarray = field(default_factory=_floats)  # [M], of keeping, when it was decided
    output_position: np.ndarray = field(default_factory=_integers)  # [M] int64
    branch_decision: np.ndarray = field(default_factory=_integers)  # [B] int64, which decision
    branch_weight: np.ndarray = field(default_factory=_floats)  # [B], how many mismatches of its response it stands for
    branch_keep: np.ndarray = field(default_factory=_floats)  # [B], mean reward when its draft token is kept
    branch_drop: np.ndarray = field(default_factory=_floats)  # [B], and when it is not
    branch_keep_saved: np.ndarray = field(default_factory=_floats)  # [B], share of target steps saved when it is kept
    branch_drop_saved: np.ndarray = field(default_factory=_floats)  # [B], and when it is not
    branch_keep_capped: np.ndarray = field(default_factory=_flags)  # [B], whether max_tokens ended it when it is kept
    branch_drop_capped: np.ndarray = field(default_factory=_flags)  # [B], and when it is not
    continuations: int = 0  # graded answers beside the responses': what followed on the roads of the branches
    discarded: int = 0  # continuations that left the road before their mismatch
    failures: list[str] = field(default_factory=list)  # a sentence about each answer that could not be graded
    generated_tokens: int = 0  # branches included
    generating_s: float = 0.0
    busy_s: float = 0.0

    @staticmethod
    def merge(parts: list[Episodes]) -> Episodes:
        """Put parts end to end; indices are moved along."""
        if not parts:
            return Episodes()
        merged = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name, value in vars(parts[0]).items()
            if isinstance(value, np.ndarray)
        }
        for name, counted in (("episode", "problem"), ("branch_decision", "kept")):
            offsets = np.cumsum([0, *(len(getattr(part, counted)) for part in parts[:-1])])
            merged[name] = np.concatenate(
                [getattr(part, name) + offset for part, offset in zip(parts, offsets, strict=True)]
            )
        return Episodes(
            **merged,
            texts=[text for part in parts for text in part.texts],
            failures=[text for part in parts for text in part.failures],
            **{
                name: sum(getattr(part, name) for part in parts)
                for name in ("continuations", "discarded", "generated_tokens", "generating_s", "busy_s")
            },
        )

    @property
    def graded(self) -> int:
        """How many answers were graded."""
        return len(self.reward) + self.continuations

    @property
    def acceptance_length(self) -> float:
        """Tokens per target step after each response's first, which follows the prompt; 1 where there is none."""
        steps = int((self.steps - 1).sum())
        return float((self.tokens - 1).sum()) / steps if steps > 0 else 1.0

    def difference(self) -> np.ndarray:
        """Return what keeping was worth in reward at each branch, [B]: by how much the two answers differ."""
        return self.branch_keep - self.branch_drop


def saved(steps: Any, tokens: Any) -> Any:
    """Share of target steps saved, 1 - steps / tokens, in [0, 1)."""
    return 1 - steps / np.maximum(tokens, 1)
