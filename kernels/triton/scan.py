"""The last stage of arbitration: the walk through each block.

See :mod:`vllm_cospec.kernels.triton.target` for the mathematics and the order of the stages.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32

from vllm_cospec.kernels.regret import REGRET_UNIT
from vllm_cospec.kernels.triton.draft import draft_row_statistics, draft_tile
from vllm_cospec.kernels.triton.layout import (
    ACCEPTED,
    BLOCK_POSITION,
    DRAFT_ENTROPY,
    DRAFT_FIELDS,
    DRAFT_LOGPROB_DRAFT,
    DRAFT_LOGPROB_TARGET,
    DRAFT_LSE,
    DRAFT_TOP2_GAP,
    ENTROPY,
    GAP,
    KL_DRAFT_TARGET,
    LOGIT_DRAFT,
    LOGIT_TOP,
    LOGPROB_DRAFT,
    LOGPROB_TOP,
    LOOKAHEAD_MATCHES,
    MATCH,
    MATCHES_BEFORE,
    NO_DRAFT,
    OPEN,
    OUTPUT_POSITION,
    OVERRIDES_IN_BLOCK,
    OVERRIDES_SO_FAR,
    RANK,
    RATIO,
    RAW_LSE,
    ROW_FLOATS,
    ROW_INTS,
    STATISTICS,
    STATUS,
    STRICT_TOKEN,
    TARGET_ENTROPY,
    TARGET_LOGPROB_DRAFT,
    TARGET_LOGPROB_TOP,
    TARGET_LSE,
    TARGET_RANK_DRAFT,
    TARGET_TOP2_GAP,
    TOP,
    TOP_K_ENTROPY,
    UNIFORM,
)
from vllm_cospec.kernels.triton.policies import LEARNED, network_score, rule_keeps
from vllm_cospec.kernels.triton.target import temperature_of

# Keeps the coin of a sampled action apart from the uniform strict verification draws at the same position, and from
# vLLM's own offsets: positions stay far below it.
_ACTION_OFFSET = tl.constexpr(1 << 29)

_REGRET_UNIT = tl.constexpr(REGRET_UNIT)


@triton.jit
def _surroundings(
    accepted,  # [PADDED_STEPS] int32, strict verification's verdicts
    match,  # [PADDED_STEPS] int32, whether t* = d
    steps,  # [PADDED_STEPS]
    i,  # position of the mismatch
    PADDED_STEPS: tl.constexpr,
):
    """Matches that follow, matches before, and drafts that strict verification accepts next."""
    after = steps > i
    lookahead = tl.min(tl.where(after & (match == 0), steps, PADDED_STEPS), axis=0) - i - 1
    before = tl.sum(tl.where(after | (steps == i), 0, match), axis=0)
    native_run = tl.min(tl.where(after & (accepted == 0), steps, PADDED_STEPS), axis=0) - i - 1
    return lookahead, before, native_run


@triton.jit
def _draft_statistics(
    partials_ptr,  # [DRAFT_FIELDS, num_tiles] float32 of this request, written unless the mismatch was foreseen
    raw_row_ptr,  # [V]
    draft_row_ptr,  # [V]
    lse,  # of the raw row
    draft_token,
    top,
    foreseen,  # whether the partials are already those of this row
    vocab_size,
    num_tiles,
    TILE_SIZE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """What the draft's row says of a mismatch."""
    if not foreseen:
        tl.debug_barrier()  # the partials of the previous mismatch have been read
        for tile in range(num_tiles):
            draft_tile(partials_ptr, raw_row_ptr, draft_row_ptr, lse, tile, vocab_size, num_tiles, TILE_SIZE)
        tl.debug_barrier()  # the partials written by other threads are seen
    return draft_row_statistics(
        partials_ptr,
        tl.load(draft_row_ptr + draft_token).to(tl.float32),
        tl.load(draft_row_ptr + top).to(tl.float32),
        num_tiles,
        PADDED_TILES,
    )


@triton.jit
def _statistics_row(
    floats_ptr,  # of the row of logits
    rank,
    q_draft, q_top, q_gap, q_entropy, kl,
    i,
    lookahead,
    before,
    overrides,  # in this block
    spent,  # before this block
    output_position,
    num_steps,
):  # fmt: skip
    """The statistics of a mismatch in the order of the schema, float32 [STATISTICS]."""
    column = tl.arange(0, STATISTICS)
    x = tl.where(column == TARGET_LOGPROB_DRAFT, tl.load(floats_ptr + LOGPROB_DRAFT), 0.0)
    x = tl.where(column == TARGET_LOGPROB_TOP, tl.load(floats_ptr + LOGPROB_TOP), x)
    x = tl.where(column == TARGET_TOP2_GAP, tl.load(floats_ptr + GAP), x)
    x = tl.where(column == TARGET_ENTROPY, tl.load(floats_ptr + ENTROPY), x)
    x = tl.where(column == TARGET_RANK_DRAFT, tl.log((rank + 1).to(tl.float32)), x)
    x = tl.where(column == DRAFT_LOGPROB_DRAFT, q_draft, x)
    x = tl.where(column == DRAFT_LOGPROB_TARGET, q_top, x)
    x = tl.where(column == DRAFT_TOP2_GAP, q_gap, x)
    x = tl.where(column == DRAFT_ENTROPY, q_entropy, x)
    x = tl.where(column == KL_DRAFT_TARGET, kl, x)
    x = tl.where(column == BLOCK_POSITION, i / num_steps, x)
    x = tl.where(column == LOOKAHEAD_MATCHES, lookahead.to(tl.float32) / num_steps, x)
    x = tl.where(column == MATCHES_BEFORE, before.to(tl.float32) / num_steps, x)
    x = tl.where(column == OVERRIDES_IN_BLOCK, overrides.to(tl.float32), x)
    x = tl.where(column == OVERRIDES_SO_FAR, tl.log((spent + overrides + 1).to(tl.float32)), x)
    return tl.where(column == OUTPUT_POSITION, tl.log((output_position + 1).to(tl.float32)), x)


@triton.jit
def _score_bound(threshold_ptr, seed_ptr, slot, position, SAMPLE_ACTIONS: tl.constexpr):
    """What a score has to exceed: the request's threshold or, in training, a coin."""
    if SAMPLE_ACTIONS:
        return tl_rand32(tl.load(seed_ptr + slot), position + _ACTION_OFFSET, includes_zero=False)
    else:
        return tl.load(threshold_ptr + slot)


@triton.jit
def _given_up(logit_top, logit_draft):
    """Nats that keeping the draft gives up, rounded up to a unit."""
    return tl.ceil((logit_top - logit_draft) / _REGRET_UNIT) * _REGRET_UNIT


@triton.jit
def _decided_beforehand(keep, forced, output_position):
    """Training: a decision made elsewhere, and what lies before it in the response is kept."""
    if output_position <= (forced >> 1):  # -1 >> 1 is -1
        keep = (output_position < (forced >> 1)) | ((forced & 1) == 1)
    return keep


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
    temperature_ptr,  # [slots] float32, or None where the verdict is given
    seed_ptr,  # [slots] int64
    arbitrated_ptr,  # [slots] int32
    threshold_ptr,  # [slots] float32
    max_overrides_ptr,  # [slots] int32
    overrides_so_far_ptr,  # [slots] int32, added to
    max_regret_ptr,  # [slots] float32
    regret_so_far_ptr,  # [slots] float32, added to
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
    greedy, _ = temperature_of(temperature_ptr, slot)
    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    spent = tl.load(overrides_so_far_ptr + slot)
    budget = tl.load(max_overrides_ptr + slot) - spent
    regret = tl.load(regret_so_far_ptr + slot)
    max_regret = tl.load(max_regret_ptr + slot)
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
                given_up = _given_up(tl.load(floats + LOGIT_TOP), tl.load(floats + LOGIT_DRAFT))
                affordable = (max_regret == float("inf")) | ((max_regret > 0) & (regret + given_up <= max_regret))
                if (status == OPEN) & (overrides < budget) & affordable:
                    output_position = tl.load(pos_ptr + row) + 1 - tl.load(response_start_ptr + slot)
                    rank = tl.load(ints + RANK)
                    top = tl.load(ints + TOP)
                    finite = True
                    q_draft, q_top, q_gap, q_entropy, kl = 0.0, 0.0, 0.0, 0.0, 0.0
                    if NEEDS_DRAFT:
                        q_draft, q_top, q_gap, q_entropy, kl, finite = _draft_statistics(
                            partials_ptr, raw_ptr + row * raw_stride,
                            draft_ptr + slot * draft_stride_0 + i * draft_stride_1, tl.load(floats + RAW_LSE),
                            draft_token, top, i == foreseen, vocab_size, num_tiles, TILE_SIZE, PADDED_TILES,
                        )  # fmt: skip
                    if finite:
                        lookahead, before, native_run = _surroundings(accepted, match, steps, i, PADDED_STEPS)
                        probability = 0.0
                        if COLLECT or POLICY == LEARNED:
                            x = _statistics_row(
                                floats, rank, q_draft, q_top, q_gap, q_entropy, kl, i, lookahead, before, overrides,
                                spent, output_position, num_steps,
                            )  # fmt: skip
                        if POLICY == LEARNED:
                            probability = network_score(x, weights_ptr, HIDDEN_1, HIDDEN_2, PADDED_1, PADDED_2)
                            keep = probability > _score_bound(
                                threshold_ptr, seed_ptr, slot, tl.load(pos_ptr + row), SAMPLE_ACTIONS
                            )
                        else:
                            keep = rule_keeps(
                                tl.load(floats + LOGPROB_DRAFT), tl.load(floats + LOGPROB_TOP),
                                tl.load(floats + ENTROPY), rank,
                                tl.load(floats + LOGIT_DRAFT), tl.load(floats + LOGIT_TOP),
                                tl.load(floats + TOP_K_ENTROPY), kl, tl.load(floats + RATIO), tl.load(floats + UNIFORM),
                                native_run, num_drafts - i - 1, output_position, draft_token, top,
                                first, second, seed, window, POLICY,
                            )  # fmt: skip
                        if COLLECT:
                            keep = _decided_beforehand(keep, tl.load(forced_ptr + slot), output_position)
                            tl.store(trace_statistics_ptr + row * STATISTICS + tl.arange(0, STATISTICS), x)
                            tl.store(trace_action_ptr + row, keep.to(tl.int32))
                            tl.store(trace_probability_ptr + row, probability)
                        if keep:
                            overrides += 1
                            regret += given_up
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
    tl.store(regret_so_far_ptr + slot, regret)
