"""Requests as they end, made up: what the drift test and what follows from it are tested with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vllm_cospec.drift import Finished, histogram


def traffic(seed: int, mismatch_rate: float = 0.1, keep_rate: float = 0.3, tokens: int = 40) -> Iterator[Finished]:
    """Requests that differ much from each other: rates are drawn anew for each of them."""
    rng = np.random.default_rng(seed)
    while True:
        length = int(rng.integers(tokens // 2, 2 * tokens))
        mismatches = int(rng.binomial(length, rng.beta(2, 2 / mismatch_rate - 2)))
        kept = rng.random(mismatches) < rng.beta(1, 1 / keep_rate - 1)
        scores = np.where(kept, rng.beta(8, 0.2, mismatches), rng.beta(0.2, 8, mismatches))
        yield Finished(length, mismatches, int((scores > 0.5).sum()), histogram(scores))


def some(n: int, seed: int, **how: float) -> list[Finished]:
    stream = traffic(seed, **how)  # type: ignore[arg-type]
    return [next(stream) for _ in range(n)]
