"""A strict verdict that was reached elsewhere: how Model Runner V1 uses the fused path.

V1 draws its random numbers from generators, in an order of its own. So stock's functions draw them, and what they drew
arrives here: for every draft one uniform u and one recovered token, beside the probabilities p and q it is compared
with. ``given_verdict_kernel`` compares as stock's two rejection kernels do (the draft is the argmax; p / q >= u) and
writes the outcome over what stage 2 of :mod:`vllm_cospec.kernels.triton.target` made of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.triton.target import (
    ACCEPTED,
    CLOSED,
    INFINITY,
    NO_DRAFT,
    OPEN,
    RATIO,
    ROW_FLOATS,
    ROW_INTS,
    STATUS,
    STRICT_TOKEN,
    UNIFORM,
)


@dataclass
class Verdict:
    """What stock drew for N drafts of B requests; requests lie in the order of their rows of logits."""

    draft_tokens: Tensor  # [N] int32
    request: Tensor  # [N] int64, whose draft it is
    proposed: Tensor  # [S, K] int32, what the drafter proposed in each slot; a request with other drafts is strict
    processed: Tensor  # [N, V] float32, decides what is legal
    argmax: Tensor  # [N] int64, of the processed logits
    temperature: Tensor | None = None  # [B] float32, 0 for greedy requests; None, as the rest, when all are greedy
    probabilities: Tensor | None = None  # [N, V] float32, of the target
    draft_probabilities: Tensor | None = None  # [N, V] float32, None for drafts without probabilities
    recovered: Tensor | None = None  # [N] int32, emitted where a sampled request's draft is not kept
    uniform: Tensor | None = None  # [N] float64

    def write(
        self, row_ints: Tensor, row_floats: Tensor, cu_num_logits: Tensor, idx_mapping: Tensor, padded_steps: int
    ) -> None:
        """Put the verdict into the rows stage 2 has written; arguments as in ``launch.arbitrate``."""
        given_verdict_kernel[(self.draft_tokens.shape[0],)](
            row_ints, row_floats, cu_num_logits, idx_mapping, self.draft_tokens, self.request, self.proposed,
            self.proposed.stride(0), self.processed, self.processed.stride(0), self.argmax, self.temperature,
            self.probabilities, self.draft_probabilities, self.recovered, self.uniform, self.processed.shape[1],
            PADDED_STEPS=padded_steps,
            num_warps=1,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["proposed_stride", "processed_stride", "vocab_size"],
    do_not_specialize_on_alignment=["cu_num_logits_ptr", "request_slot_ptr", "request_ptr"],
)
def given_verdict_kernel(
    row_ints_ptr,  # [num_rows, ROW_INTS] int32, written
    row_floats_ptr,  # [num_rows, ROW_FLOATS] float32, written
    cu_num_logits_ptr,  # [B + 1]
    request_slot_ptr,  # [B]
    draft_ptr,  # [N] int32
    request_ptr,  # [N]
    proposed_ptr,  # [S, K] int32
    proposed_stride,
    processed_ptr,  # [N, V] float32
    processed_stride,
    argmax_ptr,  # [N] int64
    temperature_ptr,  # [B] float32, or None, as the rest
    probability_ptr,  # [N, V] float32
    draft_probability_ptr,  # [N, V] float32 or None
    recovered_ptr,  # [N] int32
    uniform_ptr,  # [N] float64
    vocab_size,
    PADDED_STEPS: tl.constexpr,  # more than K
):
    index = tl.program_id(0).to(tl.int64)
    request = tl.load(request_ptr + index).to(tl.int64)
    start = tl.load(cu_num_logits_ptr + request).to(tl.int64)
    num_drafts = tl.load(cu_num_logits_ptr + request + 1).to(tl.int64) - start - 1
    row = index + request  # every request before has one row without a draft
    row_ints_ptr += row * ROW_INTS
    row_floats_ptr += row * ROW_FLOATS
    token = tl.load(draft_ptr + index)
    known = (token >= 0) & (token < vocab_size)

    steps = tl.arange(0, PADDED_STEPS)
    present = steps < num_drafts
    drafts = tl.load(draft_ptr + (start - request) + steps, mask=present, other=0)
    slot = tl.load(request_slot_ptr + request).to(tl.int64)
    proposed = tl.load(proposed_ptr + slot * proposed_stride + steps, mask=present, other=0)
    junk = tl.max((drafts != proposed).to(tl.int32), axis=0)

    emitted = tl.load(argmax_ptr + index).to(tl.int32)
    accepted = token == emitted
    ratio = 0.0
    uniform = 1.0
    if temperature_ptr is not None:  # noqa: SIM102 - chosen at compile time, the next at run time
        if tl.load(temperature_ptr + request) != 0.0:
            place = index * processed_stride + token  # probabilities are laid out as the logits are
            p = tl.load(probability_ptr + place, mask=known, other=0.0)
            q = tl.full((), 1.0, tl.float32)
            if draft_probability_ptr is not None:
                q = tl.load(draft_probability_ptr + place, mask=known, other=0.0)
            drawn = tl.load(uniform_ptr + index)
            possible = known & (q > 0.0)
            accepted = possible & (p / q >= drawn)  # in float64, as stock
            emitted = tl.load(recovered_ptr + index).to(tl.int32)
            ratio = tl.where(possible, p / q, 0.0)
            uniform = drawn.to(tl.float32)
    legal = tl.load(processed_ptr + index * processed_stride + token, mask=known, other=-INFINITY)
    is_open = (tl.load(row_ints_ptr + STATUS) == OPEN) & (tl.abs(legal) < INFINITY)
    status = tl.where((junk != 0) | (token < 0), NO_DRAFT, tl.where(is_open, OPEN, CLOSED))
    tl.store(row_ints_ptr + ACCEPTED, accepted.to(tl.int32))
    tl.store(row_ints_ptr + STRICT_TOKEN, emitted)
    tl.store(row_ints_ptr + STATUS, status)
    tl.store(row_floats_ptr + RATIO, ratio)
    tl.store(row_floats_ptr + UNIFORM, uniform)
