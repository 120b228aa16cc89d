"""What a rule asks of both distributions together, at the positions the policy may come to.

    KIND        of a block                                          of the row
    JS          sum 1/2 (p log(p / m) + q log(q / m)), m = (p+q)/2  their sum
    TV          sum 1/2 |p - q|                                     their sum
    MIXTURE     max w p + (1 - w) q over all tokens but d           their maximum

q is known only when all blocks of the draft's row are, so this is a pass of its own, after the one that gathers them
(:mod:`vllm_cospec.kernels.triton.mismatch`) and for rules that ask for it alone.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.policy import JOINT as KINDS
from vllm_cospec.kernels.statistics import TINY
from vllm_cospec.kernels.triton.layout import (
    DRAFT_MAX,
    DRAFT_SUM,
    FLOOR,
    INFINITY,
    JOINT,
    LOG_SUM,
    LOGIT_TOP,
    MISMATCH_FIELDS,
    ROW_FIELDS,
)
from vllm_cospec.kernels.triton.mismatch import own_candidates
from vllm_cospec.kernels.triton.target import place_of
from vllm_cospec.kernels.triton.tiles import aligned, combine, exp, load_logits

NONE, JS, TV, MIXTURE = map(tl.constexpr, (0, *KINDS.values()))
_TINY = tl.constexpr(TINY)


@triton.jit
def _log_scale(
    partials_ptr,  # [MISMATCH_FIELDS, num_blocks] float32 of one row
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
):
    """log sum exp y of a draft's row, from its blocks."""
    block = tl.arange(0, PADDED_BLOCKS)
    inside = block < num_blocks
    largest = tl.load(partials_ptr + DRAFT_MAX * num_blocks + block, mask=inside, other=-INFINITY)
    sums = tl.load(partials_ptr + DRAFT_SUM * num_blocks + block, mask=inside, other=0.0)
    highest, total, _ = combine(largest, sums)
    return highest + tl.log(total)


@triton.jit(
    do_not_specialize=["num_blocks", "weight"],
    do_not_specialize_on_alignment=["first_ptr", "request_slot_ptr", "drafted_ptr"],
)
def joint_kernel(
    partials_ptr,  # [num_rows, MISMATCH_FIELDS, num_blocks] float32, added to where the policy may come to
    rows_ptr,  # [num_rows, ROW_FIELDS] float32
    raw_ptr,  # [num_rows, V]
    raw_stride,
    raw_width,
    draft_ptr,  # [slots, K, V]
    draft_stride_0,
    draft_stride_1,
    draft_width,
    drafted_ptr,  # [num_rows]
    first_ptr,  # [num_requests + 1]
    request_slot_ptr,  # [num_requests]
    max_overrides_ptr,  # [slots] int32
    overrides_so_far_ptr,  # [slots] int32
    max_regret_ptr,  # [slots] float32
    regret_so_far_ptr,  # [slots] float32
    vocab_size,
    num_blocks,
    weight,  # of the target in the mixture
    KIND: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_STEPS: tl.constexpr,
    UNIT: tl.constexpr,
    PADDED: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot, start, num_drafts = place_of(request, request_slot_ptr, first_ptr)
    candidates = own_candidates(
        slot, start, num_drafts, rows_ptr, max_overrides_ptr, overrides_so_far_ptr, max_regret_ptr, regret_so_far_ptr,
        PADDED_STEPS,
    )  # fmt: skip
    steps = tl.arange(0, PADDED_STEPS)
    position = tl.min(tl.where(candidates, steps, PADDED_STEPS), axis=0)
    target_width, readable = aligned(raw_width, UNIT), aligned(draft_width, UNIT)
    lanes = tl.arange(0, TILE_SIZE)
    while position < PADDED_STEPS:
        row = start + position
        fields = rows_ptr + row * ROW_FIELDS
        partials = partials_ptr + row * MISMATCH_FIELDS * num_blocks
        raw_row_ptr = raw_ptr + row * aligned(raw_stride, UNIT)
        draft_row_ptr = draft_ptr + slot * aligned(draft_stride_0, UNIT) + position * aligned(draft_stride_1, UNIT)
        token = tl.load(drafted_ptr + row + 1).to(tl.int32)
        target_scale = tl.load(fields + LOGIT_TOP) + tl.load(fields + LOG_SUM)
        draft_scale = _log_scale(partials, num_blocks, PADDED_BLOCKS)
        gathered = tl.zeros((TILE_SIZE,), tl.float32)
        for tile in range(0, BLOCK_SIZE, TILE_SIZE):
            offsets = block * BLOCK_SIZE + tile + lanes
            logits = load_logits(raw_row_ptr, offsets, vocab_size, target_width, PADDED)
            drafts = load_logits(draft_row_ptr, offsets, vocab_size, readable, PADDED)
            logp, logq = tl.maximum(logits - target_scale, FLOOR), tl.maximum(drafts - draft_scale, FLOOR)
            p, q = exp(logp), exp(logq)
            if KIND == MIXTURE:
                mixed = weight * p + (1.0 - weight) * q
                gathered = tl.maximum(gathered, tl.where(offsets == token, 0.0, mixed))
            elif KIND == TV:
                gathered += 0.5 * tl.abs(p - q)
            else:
                logm = tl.log(tl.maximum(0.5 * (p + q), _TINY))
                gathered += 0.5 * (p * (logp - logm) + q * (logq - logm))
        whole = tl.max(gathered, axis=0) if KIND == MIXTURE else tl.sum(gathered, axis=0)
        tl.store(partials + JOINT * num_blocks + block, whole)
        position = tl.min(tl.where(candidates & (steps > position), steps, PADDED_STEPS), axis=0)


@triton.jit
def joint_statistic(
    partials_ptr,  # [MISMATCH_FIELDS, num_blocks] float32 of one row
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Combine the blocks of a row -> what ``KIND`` asks for, 0 for nothing."""
    if KIND == NONE:
        return 0.0
    else:
        block = tl.arange(0, PADDED_BLOCKS)
        values = tl.load(partials_ptr + JOINT * num_blocks + block, mask=block < num_blocks, other=0.0)
        return tl.max(values, axis=0) if KIND == MIXTURE else tl.sum(values, axis=0)
