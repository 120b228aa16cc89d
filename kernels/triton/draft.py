"""The draft's row at a mismatch, read beside the target's for KL(q || p).

See :mod:`vllm_cospec.kernels.triton.target` for the mathematics and the order of the stages.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.triton.layout import (
    ACCEPTED,
    DRAFT_CROSS,
    DRAFT_FIELDS,
    DRAFT_MAX,
    DRAFT_NAN,
    DRAFT_SECOND,
    DRAFT_SUM,
    DRAFT_WEIGHTED,
    FLOOR,
    INFINITY,
    OPEN,
    RAW_LSE,
    ROW_FLOATS,
    ROW_INTS,
    STATUS,
)
from vllm_cospec.kernels.triton.tiles import combine, sums_of


@triton.jit
def draft_tile(
    partials_ptr,  # [DRAFT_FIELDS, num_tiles] float32 of one request, written
    target_row_ptr,  # [V] raw target logits
    draft_row_ptr,  # [V] raw draft logits
    target_lse,
    tile,
    vocab_size,
    num_tiles,
    TILE_SIZE: tl.constexpr,
):
    """Partial statistics of one tile of a draft row."""
    offsets = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    mask = offsets < vocab_size
    draft = tl.load(draft_row_ptr + offsets, mask=mask, other=-INFINITY).to(tl.float32)
    target = tl.load(target_row_ptr + offsets, mask=mask, other=-INFINITY).to(tl.float32)
    isnan = draft != draft
    draft = tl.where(isnan, -INFINITY, draft)
    value, total, weighted, weight = sums_of(draft)
    cross = tl.sum(weight * tl.maximum(target - target_lse, FLOOR), axis=0)
    _, index = tl.max(draft, axis=0, return_indices=True)
    second = tl.max(tl.where(offsets == tile * TILE_SIZE + index, -INFINITY, draft), axis=0)
    partials_ptr += tile
    tl.store(partials_ptr + DRAFT_MAX * num_tiles, value)
    tl.store(partials_ptr + DRAFT_SECOND * num_tiles, second)
    tl.store(partials_ptr + DRAFT_SUM * num_tiles, total)
    tl.store(partials_ptr + DRAFT_WEIGHTED * num_tiles, weighted)
    tl.store(partials_ptr + DRAFT_CROSS * num_tiles, cross)
    tl.store(partials_ptr + DRAFT_NAN * num_tiles, tl.max(isnan.to(tl.float32), axis=0))


@triton.jit
def draft_row_statistics(
    partials_ptr,  # [DRAFT_FIELDS, num_tiles] float32 of one request
    logit_draft,  # y_d
    logit_top,  # y_{t*}
    num_tiles,
    PADDED_TILES: tl.constexpr,
):
    """Combine the tiles of a draft row -> log q(d), log q(t*), gap, entropy, KL(q || p), whether all is finite."""
    tiles = tl.arange(0, PADDED_TILES)
    mask = tiles < num_tiles
    largest = tl.load(partials_ptr + DRAFT_MAX * num_tiles + tiles, mask=mask, other=-INFINITY)
    seconds = tl.load(partials_ptr + DRAFT_SECOND * num_tiles + tiles, mask=mask, other=-INFINITY)
    sums = tl.load(partials_ptr + DRAFT_SUM * num_tiles + tiles, mask=mask, other=0.0)
    weighted = tl.load(partials_ptr + DRAFT_WEIGHTED * num_tiles + tiles, mask=mask, other=0.0)
    cross = tl.load(partials_ptr + DRAFT_CROSS * num_tiles + tiles, mask=mask, other=0.0)
    nan = tl.max(tl.load(partials_ptr + DRAFT_NAN * num_tiles + tiles, mask=mask, other=0.0), axis=0)
    highest, total, moment, factor = combine(largest, sums, weighted)
    log_total = tl.log(total)
    best = tl.argmax(largest, axis=0)
    others = tl.max(tl.where(tiles == best, -INFINITY, largest), axis=0)
    second = tl.maximum(tl.max(tl.where(tiles == best, seconds, -INFINITY), axis=0), others)
    lse = highest + log_total
    gap = tl.minimum(highest - lse - tl.maximum(second - lse, FLOOR), -FLOOR)
    entropy = log_total - moment / total
    kl = moment / total - log_total - tl.sum(factor * cross, axis=0) / total
    kl = tl.minimum(tl.maximum(kl, 0.0), -FLOOR)
    finite = (nan == 0.0) & (tl.abs(highest) < INFINITY)
    return tl.maximum(logit_draft - lse, FLOOR), tl.maximum(logit_top - lse, FLOOR), gap, entropy, kl, finite


@triton.jit(
    do_not_specialize=["vocab_size", "num_tiles"],
    do_not_specialize_on_alignment=["cu_num_logits_ptr", "request_slot_ptr"],
)
def draft_statistics_kernel(
    partials_ptr,  # [num_requests, DRAFT_FIELDS, num_tiles] float32, written where a decision needs it
    row_ints_ptr,  # [num_rows, ROW_INTS] int32
    row_floats_ptr,  # [num_rows, ROW_FLOATS] float32
    raw_ptr,  # [num_rows, V]
    raw_stride,
    draft_ptr,  # [slots, K, V]
    draft_stride_0,
    draft_stride_1,
    cu_num_logits_ptr,  # [num_requests + 1]
    request_slot_ptr,  # [num_requests]
    max_overrides_ptr,  # [slots] int32
    overrides_so_far_ptr,  # [slots] int32
    vocab_size,
    num_tiles,
    TILE_SIZE: tl.constexpr,
    PADDED_STEPS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_num_logits_ptr + request).to(tl.int64)
    num_drafts = tl.load(cu_num_logits_ptr + request + 1).to(tl.int64) - start - 1
    steps = tl.arange(0, PADDED_STEPS)
    accepted = tl.load(row_ints_ptr + (start + steps) * ROW_INTS + ACCEPTED, mask=steps < num_drafts, other=1)
    first = tl.min(tl.where(accepted == 0, steps, PADDED_STEPS), axis=0)
    if first == PADDED_STEPS:
        return
    slot = tl.load(request_slot_ptr + request).to(tl.int64)
    if tl.load(overrides_so_far_ptr + slot) >= tl.load(max_overrides_ptr + slot):
        return
    row = start + first
    if tl.load(row_ints_ptr + row * ROW_INTS + STATUS) != OPEN:
        return
    draft_tile(
        partials_ptr + request * DRAFT_FIELDS * num_tiles,
        raw_ptr + row * raw_stride,
        draft_ptr + slot * draft_stride_0 + first * draft_stride_1,
        tl.load(row_floats_ptr + row * ROW_FLOATS + RAW_LSE),
        tl.program_id(1),
        vocab_size,
        num_tiles,
        TILE_SIZE,
    )
