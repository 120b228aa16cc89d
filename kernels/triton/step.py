"""What a step consists of and what becomes of it: arguments and results of :mod:`vllm_cospec.kernels.triton.launch`.

B requests, R rows of logits in all, S slots, K draft tokens at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from vllm_cospec.kernels.triton.workspace import Workspace

MAX_VOCAB_SIZE = 2**24
"""Token ids are kept as float32 between the stages, see :mod:`vllm_cospec.kernels.triton.layout`."""


@dataclass(frozen=True)
class Rows:
    """The rows of logits of a step: those of a request one after the other, its bonus row last."""

    raw: Tensor  # [R, V] float32, bfloat16 or float16, after the grammar mask only; what statistics are of
    processed: Tensor  # [R, V], what tokens are drawn from and what is legal; may be ``raw`` itself
    draft: Tensor | None  # [S, K, V], before temperature; None for drafters without logits
    drafted: Tensor  # [R] int; the draft of row r is entry r + 1, negative for a placeholder, which is never kept
    first: Tensor  # [B + 1] int, first row of each request
    position: Tensor  # [R] int64, of each row in its sequence
    request_slot: Tensor  # [B] int
    slot: Tensor  # [R] int
    step: Tensor  # [R] int, index of each row in its request
    num_steps: int  # K
    closed: Tensor | None = None  # [R] bool: strict

    def __post_init__(self) -> None:
        """Refuse what the kernels do not take, with a ValueError."""
        if self.raw.shape[1] > MAX_VOCAB_SIZE:
            raise ValueError(f"the kernels take vocabularies of up to {MAX_VOCAB_SIZE} tokens")
        if self.raw.shape != self.processed.shape or self.raw.stride(-1) != 1 or self.processed.stride(-1) != 1:
            raise ValueError("raw and processed logits must have one shape and contiguous rows")
        if self.draft is not None and (self.draft.ndim != 3 or self.draft.stride(-1) != 1):
            raise ValueError("draft logits must be [slots, K, V] with contiguous rows")

    @property
    def separate(self) -> bool:
        """Whether the processed logits are other than the raw ones."""
        return self.processed is not self.raw

    @property
    def vocab_size(self) -> int:
        """V. As stock: the target or the draft may be padded."""
        return self.raw.shape[1] if self.draft is None else min(self.raw.shape[1], self.draft.shape[2])


@dataclass(frozen=True)
class Memory:
    """What the kernels write to at every step, on the device."""

    counters: Tensor  # [K + 1 or more] int64, added to: overrides per position, then mismatches
    workspace: Workspace


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn in each slot."""

    temperature: Tensor  # [S] float32, 0 for greedy requests
    seed: Tensor  # [S] int64
    use_fp64: bool = False  # draw Gumbel noise in float64, as vLLM's option of that name


@dataclass(frozen=True)
class Slots:
    """Settings and state of every request slot; tensors of S entries on the device."""

    arbitrated: Tensor  # int32, 0: strict
    threshold: Tensor  # float32, of the learned policy
    max_overrides: Tensor  # int32, vllm_cospec.kernels.UNLIMITED for none
    max_regret: Tensor  # float32, from vllm_cospec.kernels.regret.in_units
    exact_tokens: Tensor  # int32
    overrides_so_far: Tensor  # int32, added to
    regret_so_far: Tensor  # float32, nats, added to
    response_start: Tensor  # int32, tokens before the response
    forced: Tensor  # int32, 2 * (index in the response) + keep of a decision made beforehand, -1: none; for training
    ends: Tensor  # int32 [S, 1 + STOPS], vllm_cospec.kernels.reach.ends_of; what lies behind is strict, and no mismatch
    stops: Tensor  # int32, added to: blocks that ended at a mismatch
    scores: Tensor | None = None  # [S, NUM_BINS] int32, added to: histogram of the learned policy's, None: nobody asks


@dataclass(frozen=True)
class Verdict:
    """A strict verdict reached elsewhere, on N drafts that lie in the order of their rows."""

    draft_tokens: Tensor  # [N] int32, negative for what the drafter has not proposed, which is never kept
    request: Tensor  # [N] int64, whose draft it is
    accepted: Tensor  # [N] bool
    tokens: Tensor  # [N] int64, emitted where the draft is not kept
    legal: Tensor  # [N] bool, whether the request's settings allow the draft
    seed: Tensor  # [S] int64, of sampled actions; training
    ratio: Tensor | None = None  # [N] float32, of the probabilities of target and draft; 0 for greedy requests
    uniform: Tensor | None = None  # [N] float32, 1 for greedy requests; both None where all requests are greedy


@dataclass(frozen=True)
class Trace:
    """What the policy saw and did at each row."""

    statistics: Tensor  # [R, 16] float32, defined where action >= 0
    action: Tensor  # [R] int32: 1 kept, 0 not, -1 not consulted
    probability: Tensor  # [R] float32, of keeping, for the learned policy


@dataclass(frozen=True)
class Verified:
    """What verification emits."""

    sampled: Tensor  # [B, K + 1] int64, defined up to num_sampled
    num_sampled: Tensor  # [B] int32, at least 1
    trace: Trace | None = None


@dataclass(frozen=True)
class Kept:
    """What is kept of drafts whose strict verdict was given; the token after a complete block is the caller's."""

    tokens: Tensor  # [B, K + 1] int64, defined up to num_kept; one more, the verdict's, where a draft was not kept
    num_kept: Tensor  # [B] int32, drafts kept
    trace: Trace | None = None
