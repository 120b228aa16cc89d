"""What a step is on the CPU, and what becomes of it: arguments and results of :mod:`vllm_cospec.kernels.cpu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Tokens = Tensor | np.ndarray


@dataclass
class Requests:
    """Per-request settings and state of a batch, each array with B entries."""

    arbitrated: np.ndarray  # bool; False: strict
    junk: np.ndarray  # bool; the drafter did not propose these tokens: strict
    output_position: np.ndarray  # int64, index in the response of the block's first token
    overrides_so_far: np.ndarray  # int64
    max_overrides: np.ndarray  # int64, vllm_cospec.kernels.UNLIMITED for none
    exact_tokens: np.ndarray  # int64
    threshold: np.ndarray  # float32, of the learned policy
    regret_so_far: np.ndarray  # float64, nats, see vllm_cospec.kernels.regret
    max_regret: np.ndarray  # float64, from vllm_cospec.kernels.regret.in_units
    forced_at: np.ndarray | None = None  # int64, index in the response decided beforehand, -1 for none; training
    forced_keep: np.ndarray | None = None  # bool, how; mismatches before it are kept


@dataclass(frozen=True)
class LogitRows:
    """M rows of logits, wherever they lie."""

    tensors: Sequence[Tensor]  # each [*, V]
    part: np.ndarray  # int64 [M], index into ``tensors``
    row: np.ndarray  # int64 [M], of that tensor

    @classmethod
    def of(cls, logits: Tensor) -> LogitRows:
        """Return every row of one tensor, [M, V]."""
        return cls([logits], np.zeros(len(logits), np.int64), np.arange(len(logits)))

    def stack(self) -> Tensor:
        """Return a copy, float32 [M, V]."""
        return torch.stack([self.tensors[p][r] for p, r in zip(self.part, self.row, strict=True)]).float()


@dataclass
class Batch:
    """One step of B requests with N draft tokens in all; rows of one request are consecutive."""

    draft_tokens: Tokens  # [N] int
    num_draft_tokens: np.ndarray  # [B] int64
    accepted: Tokens  # [N] bool, strict verification's verdict on each position by itself
    target_tokens: Tokens  # [N] int, emitted where the draft is not kept
    bonus_tokens: Tokens  # [B] int
    raw_target_logits: Tensor  # [N, V], or more rows with ``logit_rows``
    processed_target_logits: Tensor  # likewise
    raw_argmax: Tokens  # [N] int, t*
    draft_logits: Callable[[np.ndarray, np.ndarray], LogitRows] | None  # of (request, position), each int64 [M]
    num_speculative_tokens: int  # K
    max_draft_tokens: int  # width of the output less one
    requests: Requests
    acceptance_ratio: Tensor | None = None  # [N] float32, None when every request is greedy
    uniform: Tensor | None = None  # [N] float32
    logit_rows: Tokens | None = None  # [N] int, the row of logits each draft is verified with; None: its own
    legal: Tokens | None = None  # [N] bool, whether a draft may be kept; None: where its processed logit is finite
    ends: np.ndarray | None = None  # int64 [B, 1 + STOPS], vllm_cospec.kernels.reach.ends_of; None: nothing ends them


@dataclass
class Consulted:
    """The mismatches one round put to the policy."""

    request: np.ndarray  # [M] index into the batch
    position: np.ndarray  # [M] in the block
    output_position: np.ndarray  # [M]
    statistics: np.ndarray  # [M, 16] float32
    kept: np.ndarray  # [M] bool
    probability: np.ndarray | None  # [M] float32, of keeping

    def only(self, mask: np.ndarray) -> Consulted:
        """Return the entries where ``mask``, bool [M], is True."""
        probability = None if self.probability is None else self.probability[mask]
        return Consulted(
            self.request[mask],
            self.position[mask],
            self.output_position[mask],
            self.statistics[mask],
            self.kept[mask],
            probability,
        )


@dataclass
class BatchResult:
    """What verification makes of a batch."""

    output: Tensor  # [B, max_draft_tokens + 1] int32, PLACEHOLDER where nothing is emitted
    mismatches: np.ndarray  # [B] int64
    """Drafts of arbitrated requests that can be delivered, whether the policy could be consulted or not."""
    overrides: np.ndarray  # [B] int64
    regret: np.ndarray  # [B] float64, nats, of the overrides
    overrides_per_position: np.ndarray  # [max_draft_tokens] int64
    consulted: list[Consulted] = field(default_factory=list)

    @property
    def num_mismatches(self) -> int:
        """Of all requests together."""
        return int(self.mismatches.sum())
