"""The last stages of arbitration: the draft row of the first mismatch, and the walk through each block.

See :mod:`vllm_cospec.kernels.triton.target` for the mathematics and the order of the stages.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32

from vllm_cospec.kernels.statistics import NUM_STATISTICS
from vllm_cospec.kernels.triton.policies import LEARNED, network_score, rule_keeps
from vllm_cospec.kernels.triton.target import (
    ACCEPTED,
    DRAFT_FIELDS,
    DRAFT_LSE,
    ENTROPY,
    GAP,
    LOGIT_DRAFT,
    LOGIT_TOP,
    LOGPROB_DRAFT,
    LOGPROB_TOP,
    MATCH,
    NO_DRAFT,
    OPEN,
    RANK,
    RATIO,
    RAW_LSE,
    ROW_FLOATS,
    ROW_INTS,
    STATUS,
    STRICT_TOKEN,
    TARGET_LSE,
    TOP,
    TOP_K_ENTROPY,
    UNIFORM,
    draft_row_statistics,
    draft_tile,
)

_STATISTICS = tl.constexpr(NUM_STATISTICS)
# Keeps the coin of a sampled action apart from the uniform strict verification draws at the same position, and from
# vLLM's own offsets: positions stay far below it.
_ACTION_OFFSET = tl.constexpr(1 << 29)


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


@triton.jit(
    do_not_specialize=["vocab_size", "num_tiles", "num_steps", "first", "second", "seed", "window"],
    do_not_specialize_on_alignment=["cu_num_logits_ptr", "request_slot_ptr", "draft_sampled_ptr", "pos_ptr"],
)
def scan_kernel(
    sampled_ptr,  # [num_requests, K + 1] int64, written up to the first token that is not a draft
    sampled_stride,
    num_sampled_ptr,  # [num_requests] int32, written: number of drafts kept
    target_lse_ptr,  # [num_requests] float32, written: of the rejected row of a sampled request
    draft_lse_ptr,  # [num_requests] float32, written
    counters_ptr,  # [K + 1] int64, added to: overrides per position, mismatches last
    trace_statistics_ptr,  # [num_rows, 16] float32, written for consulted rows when COLLECT
    trace_action_ptr,  # [num_rows] int32, written for consulted rows when COLLECT
    trace_probability_ptr,  # [num_rows] float32, written for consulted rows when COLLECT
    partials_ptr,  # [num_requests, DRAFT_FIELDS, num_tiles] float32
    row_ints_ptr,  # [num_rows, ROW_INTS] int32
    row_floats_ptr,  # [num_rows, ROW_FLOATS] float32
    raw_ptr,  # [num_rows, V]
    raw_stride,
    draft_ptr,  # [slots, K, V]
    draft_stride_0,
    draft_stride_1,
    draft_sampled_ptr,  # [num_rows]
    cu_num_logits_ptr,  # [num_requests + 1]
    request_slot_ptr,  # [num_requests]
    pos_ptr,  # [num_rows]
    temperature_ptr,  # [slots] float32
    seed_ptr,  # [slots] int64
    arbitrated_ptr,  # [slots] int32
    threshold_ptr,  # [slots] float32
    max_overrides_ptr,  # [slots] int32
    overrides_so_far_ptr,  # [slots] int32, added to
    response_start_ptr,  # [slots] int32
    forced_ptr,  # [slots] int32, when COLLECT
    weights_ptr,  # float32, of the learned policy
    vocab_size,
    num_tiles,
    num_steps,  # K
    first,  # the policy's two numbers, seed and window
    second,
    seed,
    window,
    TILE_SIZE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    PADDED_STEPS: tl.constexpr,  # more than K
    POLICY: tl.constexpr,
    NEEDS_DRAFT: tl.constexpr,
    COLLECT: tl.constexpr,
    SAMPLE_ACTIONS: tl.constexpr,
    HIDDEN_1: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    PADDED_1: tl.constexpr,
    PADDED_2: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(request_slot_ptr + request).to(tl.int64)
    start = tl.load(cu_num_logits_ptr + request).to(tl.int64)
    num_drafts = (tl.load(cu_num_logits_ptr + request + 1).to(tl.int64) - start - 1).to(tl.int32)
    greedy = tl.load(temperature_ptr + slot).to(tl.float32) == 0.0
    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    spent = tl.load(overrides_so_far_ptr + slot)
    budget = tl.load(max_overrides_ptr + slot) - spent
    if NEEDS_DRAFT:
        partials_ptr += request * DRAFT_FIELDS * num_tiles
    sampled_ptr += request * sampled_stride

    steps = tl.arange(0, PADDED_STEPS)
    present = steps < num_drafts
    accepted = tl.load(row_ints_ptr + (start + steps) * ROW_INTS + ACCEPTED, mask=present, other=0)
    match = tl.load(row_ints_ptr + (start + steps) * ROW_INTS + MATCH, mask=present, other=0)
    foreseen = tl.min(tl.where((accepted == 0) & present, steps, PADDED_STEPS), axis=0)

    num_kept = tl.zeros((), tl.int32)
    overrides = tl.zeros((), tl.int32)
    target_lse = 0.0
    draft_lse = 0.0
    scanning = True
    for i in range(num_drafts):
        if scanning:
            row = start + i
            ints = row_ints_ptr + row * ROW_INTS
            floats = row_floats_ptr + row * ROW_FLOATS
            draft_token = tl.load(draft_sampled_ptr + row + 1).to(tl.int64)
            keep = tl.load(ints + ACCEPTED) != 0
            target_lse = tl.load(floats + TARGET_LSE)
            draft_lse = tl.load(floats + DRAFT_LSE)
            if not keep:
                status = tl.load(ints + STATUS)
                if arbitrated & (status != NO_DRAFT):
                    tl.atomic_add(counters_ptr + num_steps, tl.full((), 1, tl.int64))
                if (status == OPEN) & (overrides < budget):
                    output_position = tl.load(pos_ptr + row) + 1 - tl.load(response_start_ptr + slot)
                    rank = tl.load(ints + RANK)
                    top = tl.load(ints + TOP)
                    logprob_draft = tl.load(floats + LOGPROB_DRAFT)
                    logprob_top = tl.load(floats + LOGPROB_TOP)
                    entropy = tl.load(floats + ENTROPY)
                    finite = True
                    q_draft = 0.0
                    q_top = 0.0
                    q_gap = 0.0
                    q_entropy = 0.0
                    kl = 0.0
                    if NEEDS_DRAFT:
                        draft_row_ptr = draft_ptr + slot * draft_stride_0 + i * draft_stride_1
                        if i != foreseen:
                            lse = tl.load(floats + RAW_LSE)
                            tl.debug_barrier()  # the partials of the previous mismatch have been read
                            for tile in range(num_tiles):
                                draft_tile(
                                    partials_ptr, raw_ptr + row * raw_stride, draft_row_ptr, lse,
                                    tile, vocab_size, num_tiles, TILE_SIZE,
                                )  # fmt: skip
                            tl.debug_barrier()  # the partials written by other threads are seen
                        q_draft, q_top, q_gap, q_entropy, kl, finite = draft_row_statistics(
                            partials_ptr,
                            tl.load(draft_row_ptr + draft_token).to(tl.float32),
                            tl.load(draft_row_ptr + top).to(tl.float32),
                            num_tiles,
                            PADDED_TILES,
                        )
                    if finite:
                        after = steps > i
                        lookahead = tl.min(tl.where(after & (match == 0), steps, PADDED_STEPS), axis=0) - i - 1
                        before = tl.sum(tl.where(after | (steps == i), 0, match), axis=0)
                        native_run = tl.min(tl.where(after & (accepted == 0), steps, PADDED_STEPS), axis=0) - i - 1
                        probability = 0.0
                        if COLLECT or POLICY == LEARNED:
                            column = tl.arange(0, _STATISTICS)
                            x = tl.where(column == 0, logprob_draft, 0.0)
                            x = tl.where(column == 1, logprob_top, x)
                            x = tl.where(column == 2, tl.load(floats + GAP), x)
                            x = tl.where(column == 3, entropy, x)
                            x = tl.where(column == 4, tl.log((rank + 1).to(tl.float32)), x)
                            x = tl.where(column == 5, q_draft, x)
                            x = tl.where(column == 6, q_top, x)
                            x = tl.where(column == 7, q_gap, x)
                            x = tl.where(column == 8, q_entropy, x)
                            x = tl.where(column == 9, kl, x)
                            x = tl.where(column == 10, i / num_steps, x)
                            x = tl.where(column == 11, lookahead.to(tl.float32) / num_steps, x)
                            x = tl.where(column == 12, before.to(tl.float32) / num_steps, x)
                            x = tl.where(column == 13, overrides.to(tl.float32), x)
                            x = tl.where(column == 14, tl.log((spent + overrides + 1).to(tl.float32)), x)
                            x = tl.where(column == 15, tl.log((output_position + 1).to(tl.float32)), x)
                        if POLICY == LEARNED:
                            probability = network_score(x, weights_ptr, HIDDEN_1, HIDDEN_2, PADDED_1, PADDED_2)
                            bound = tl.load(threshold_ptr + slot)
                            if SAMPLE_ACTIONS:
                                bound = tl_rand32(
                                    tl.load(seed_ptr + slot),
                                    tl.load(pos_ptr + row) + _ACTION_OFFSET,
                                    includes_zero=False,
                                )
                            keep = probability > bound
                        else:
                            keep = rule_keeps(
                                logprob_draft, logprob_top, entropy, rank,
                                tl.load(floats + LOGIT_DRAFT), tl.load(floats + LOGIT_TOP),
                                tl.load(floats + TOP_K_ENTROPY), kl, tl.load(floats + RATIO), tl.load(floats + UNIFORM),
                                native_run, num_drafts - i - 1, output_position, draft_token, top,
                                first, second, seed, window, POLICY,
                            )  # fmt: skip
                        if COLLECT:
                            forced = tl.load(forced_ptr + slot)
                            if output_position <= (forced >> 1):  # -1 >> 1 is -1
                                keep = (output_position < (forced >> 1)) | ((forced & 1) == 1)
                            tl.store(trace_statistics_ptr + row * _STATISTICS + column, x)
                            tl.store(trace_action_ptr + row, keep.to(tl.int32))
                            tl.store(trace_probability_ptr + row, probability)
                        if keep:
                            overrides += 1
                            tl.atomic_add(counters_ptr + i, tl.full((), 1, tl.int64))
            # vLLM's resampling replaces the draft of a rejected row of a sampled request
            emit_draft = keep | (not greedy)
            tl.store(sampled_ptr + i, tl.where(emit_draft, draft_token, tl.load(ints + STRICT_TOKEN).to(tl.int64)))
            num_kept += keep.to(tl.int32)
            scanning = keep

    tl.store(num_sampled_ptr + request, num_kept)
    tl.store(target_lse_ptr + request, target_lse)
    tl.store(draft_lse_ptr + request, draft_lse)
    tl.store(overrides_so_far_ptr + slot, spent + overrides)
