"""What ``collect`` records of a mismatch; the same for both runners."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """One consulted mismatch."""

    request_id: str
    output_position: int
    block_position: int
    statistics: Tensor  # [16] float32
    kept: bool
    probability: float | None  # of keeping, where the policy has one
    generator: bytes | None = None  # state of a sampled request's generator before the block, on V1 and the CPU
