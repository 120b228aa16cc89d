"""The last stage of arbitration: the walk through each block.

See :mod:`vllm_cospec.kernels.triton.target` for the mathematics and the order of the stages.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32

from vllm_cospec.kernels.scores import SCORE_EDGES
from vllm_cospec.kernels.triton.joint import joint_statistic
from vllm_cospec.kernels.triton.layout import (
    ACCEPTED,
    BLOCK_FIELDS,
    BLOCK_POSITION,
    DRAFT_ENTROPY,
    DRAFT_LOGPROB_DRAFT,
    DRAFT_LOGPROB_TARGET,
    DRAFT_LSE,
    DRAFT_TOP2_GAP,
    EXTRA_STATISTIC,
    FLOOR,
    KL_DRAFT_TARGET,
    LOG_SUM,
    LOGIT_DRAFT,
    LOGIT_TOP,
    LOOKAHEAD_MATCHES,
    MATCH,
    MATCHES_BEFORE,
    MISMATCH_FIELDS,
    NO_DRAFT,
    NOTHING,
    OPEN,
    OUTPUT_POSITION,
    OVERRIDES_IN_BLOCK,
    OVERRIDES_SO_FAR,
    RATIO,
    ROW_FIELDS,
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
    UNIFORM,
)
from vllm_cospec.kernels.triton.mismatch import affordable, draft_choices, given_up, target_choices
from vllm_cospec.kernels.triton.policies import LEARNED, network_score, rule_keeps
from vllm_cospec.kernels.triton.target import place_of, temperature_of

EDGES, PADDED_EDGES = tl.constexpr(len(SCORE_EDGES)), tl.constexpr(1 << (len(SCORE_EDGES) - 1).bit_length())
# Keeps the coin of a sampled action apart from the uniform strict verification draws at the same position, and from
# vLLM's own offsets: positions stay far below it.
_ACTION_OFFSET = tl.constexpr(1 << 29)


@triton.jit
def _surroundings(
    accepted,  # [PADDED_STEPS] float32, strict verification's verdicts
    match,  # [PADDED_STEPS] float32, whether t* = d
    steps,  # [PADDED_STEPS]
    i,  # position of the mismatch
    PADDED_STEPS: tl.constexpr,
):
    """Matches that follow, matches before, and drafts that strict verification accepts next."""
    after = steps > i
    lookahead = tl.min(tl.where(after & (match == 0), steps, PADDED_STEPS), axis=0) - i - 1
    before = tl.sum(tl.where(after | (steps == i), 0.0, match), axis=0)
    native_run = tl.min(tl.where(after & (accepted == 0), steps, PADDED_STEPS), axis=0) - i - 1
    return lookahead, before, native_run


@triton.jit
def _target_side(
    fields,  # of the row
    blocks,  # of the row
    partials_ptr,  # [num_rows, MISMATCH_FIELDS, num_blocks] float32, or None
    row,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
):
    """What is known of the target's row -> entropy, rank of d, distance of the two first choices, the first pass's."""
    extra = 0.0
    if KIND != NOTHING:  # else nothing is written there
        extra = tl.load(fields + EXTRA_STATISTIC)
    if partials_ptr is None:
        return extra, extra, 0.0, extra  # a rule reads one of these at most
    else:
        entropy, rank, gap = target_choices(
            partials_ptr + row * MISMATCH_FIELDS * num_blocks, blocks,
            tl.load(fields + TOP), tl.load(fields + LOGIT_TOP), tl.load(fields + LOG_SUM),
            num_blocks, BLOCK_SIZE, PADDED_BLOCKS,
        )  # fmt: skip
        return entropy, rank, gap, extra


@triton.jit
def _draft_side(
    partials_ptr,  # [num_rows, MISMATCH_FIELDS, num_blocks] float32
    draft_ptr,  # [slots, K, V], or None where the policy does not look at it
    place,  # of the draft's row
    row,
    draft_token,
    top,  # t*
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
):
    """What is known of the draft's row -> log q(d), log q(t*), gap, entropy, KL(q || p), whether it is sound."""
    if draft_ptr is None:
        return 0.0, 0.0, 0.0, 0.0, 0.0, True
    else:
        return draft_choices(
            partials_ptr + row * MISMATCH_FIELDS * num_blocks,
            tl.load(draft_ptr + place + draft_token).to(tl.float32),
            tl.load(draft_ptr + place + top.to(tl.int32)).to(tl.float32),
            num_blocks, PADDED_BLOCKS,
        )  # fmt: skip


@triton.jit
def _joint_side(
    partials_ptr,  # [num_rows, MISMATCH_FIELDS, num_blocks] float32, or None where they are not needed
    row,
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
):
    """What is known of both rows together, 0 where the policy does not ask."""
    if partials_ptr is None:
        return 0.0
    else:
        return joint_statistic(partials_ptr + row * MISMATCH_FIELDS * num_blocks, num_blocks, PADDED_BLOCKS, KIND)


@triton.jit
def _statistics_row(
    logprob_draft,
    logprob_top,
    gap,
    entropy,
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
    x = tl.where(column == TARGET_LOGPROB_DRAFT, logprob_draft, 0.0)
    x = tl.where(column == TARGET_LOGPROB_TOP, logprob_top, x)
    x = tl.where(column == TARGET_TOP2_GAP, gap, x)
    x = tl.where(column == TARGET_ENTROPY, entropy, x)
    x = tl.where(column == TARGET_RANK_DRAFT, tl.log(rank + 1.0), x)
    x = tl.where(column == DRAFT_LOGPROB_DRAFT, q_draft, x)
    x = tl.where(column == DRAFT_LOGPROB_TARGET, q_top, x)
    x = tl.where(column == DRAFT_TOP2_GAP, q_gap, x)
    x = tl.where(column == DRAFT_ENTROPY, q_entropy, x)
    x = tl.where(column == KL_DRAFT_TARGET, kl, x)
    x = tl.where(column == BLOCK_POSITION, i / num_steps, x)
    x = tl.where(column == LOOKAHEAD_MATCHES, lookahead.to(tl.float32) / num_steps, x)
    x = tl.where(column == MATCHES_BEFORE, before / num_steps, x)
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
def _count_score(
    scores_ptr,  # [EDGES + 1] int32 of the slot, added to
    stride,
    edges_ptr,  # [EDGES] float32
    score,
    EDGES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Count a score in its bin of the slot's histogram; a request has one program, so nobody else adds there."""
    place = tl.arange(0, PADDED)
    edges = tl.load(edges_ptr + place, mask=place < EDGES, other=2.0)
    own = scores_ptr + tl.sum((score >= edges).to(tl.int32), axis=0).to(tl.int64) * stride
    tl.store(own, tl.load(own) + 1)


@triton.jit
def _decided_beforehand(keep, forced, output_position):
    """Training: a decision made elsewhere, and what lies before it in the response is kept."""
    if output_position <= (forced >> 1):  # -1 >> 1 is -1
        keep = (output_position < (forced >> 1)) | ((forced & 1) == 1)
    return keep


@triton.jit
def _record(statistics_ptr, action_ptr, probability_ptr, row, x, keep, probability):
    """Write what was seen and decided at a row."""
    tl.store(statistics_ptr + row * STATISTICS + tl.arange(0, STATISTICS), x)
    tl.store(action_ptr + row, keep.to(tl.int32))
    tl.store(probability_ptr + row, probability)


@triton.jit(
    do_not_specialize=[
        "num_blocks",
        "num_steps",
        "first",
        "second",
        "seed",
        "window",
        "scores_stride_0",
        "scores_stride_1",
    ],
    do_not_specialize_on_alignment=["first_ptr", "request_slot_ptr", "drafted_ptr", "position_ptr"],
)
def scan_kernel(
    sampled_ptr, sampled_stride,  # [num_requests, K + 1] int64, written up to the first token that is not a draft
    num_sampled_ptr,  # [num_requests] int32, written: number of drafts kept
    target_lse_ptr, draft_lse_ptr,  # [num_requests] float32, written: of the rejected row of a sampled request
    counters_ptr,  # [K + 1] int64, added to: overrides per position, mismatches last
    trace_statistics_ptr,  # [num_rows, 16] float32, written for consulted rows when COLLECT; the next two likewise
    trace_action_ptr, trace_probability_ptr,  # [num_rows] int32, and float32
    rows_ptr,  # [num_rows, ROW_FIELDS] float32
    blocks_ptr,  # [num_rows, BLOCK_FIELDS + K - 1, num_blocks] float32
    partials_ptr,  # [num_rows, MISMATCH_FIELDS, num_blocks] float32, or None where they are not needed
    draft_ptr,  # [slots, K, V], or None where the policy does not look at it
    draft_stride_0, draft_stride_1,
    drafted_ptr,  # [num_rows]
    first_ptr,  # [num_requests + 1]
    request_slot_ptr,  # [num_requests]
    position_ptr,  # [num_rows]
    temperature_ptr,  # [slots] float32, or None where the verdict is given
    seed_ptr,  # [slots] int64
    arbitrated_ptr,  # [slots] int32
    threshold_ptr,  # [slots] float32
    max_overrides_ptr, overrides_so_far_ptr,  # [slots] int32; the latter added to
    max_regret_ptr, regret_so_far_ptr,  # [slots] float32; the latter added to
    response_start_ptr,  # [slots] int32
    scores_ptr, scores_stride_0, scores_stride_1, edges_ptr,  # [slots, NUM_BINS] int32, added to, or None; float32
    forced_ptr,  # [slots] int32, when COLLECT
    weights_ptr,  # float32, of the learned policy
    num_blocks, num_steps,  # the latter K
    first, second, seed, window,  # of the policy
    BLOCK_SIZE: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
    PADDED_STEPS: tl.constexpr,  # more than K
    POLICY: tl.constexpr, JOINT: tl.constexpr,  # the latter is what it takes of both rows together
    KIND: tl.constexpr,  # of the statistic that the first pass took besides
    K: tl.constexpr,
    COLLECT: tl.constexpr, SAMPLE_ACTIONS: tl.constexpr,
    HIDDEN_1: tl.constexpr, HIDDEN_2: tl.constexpr, PADDED_1: tl.constexpr, PADDED_2: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    slot, start, num_drafts = place_of(request, request_slot_ptr, first_ptr)
    greedy, _ = temperature_of(temperature_ptr, slot)
    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    spent = tl.load(overrides_so_far_ptr + slot)
    budget = tl.load(max_overrides_ptr + slot) - spent
    max_regret, regret = tl.load(max_regret_ptr + slot), tl.load(regret_so_far_ptr + slot)
    sampled_ptr += request * sampled_stride

    steps = tl.arange(0, PADDED_STEPS)
    present = steps < num_drafts
    accepted = tl.load(rows_ptr + (start + steps) * ROW_FIELDS + ACCEPTED, mask=present, other=0.0)
    match = tl.load(rows_ptr + (start + steps) * ROW_FIELDS + MATCH, mask=present, other=0.0)

    num_kept, overrides = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    target_lse, draft_lse, scanning = 0.0, 0.0, True
    for i in range(num_drafts):
        if scanning:
            row = start + i
            fields = rows_ptr + row * ROW_FIELDS
            draft_token = tl.load(drafted_ptr + row + 1).to(tl.int64)
            keep = tl.load(fields + ACCEPTED) != 0.0
            target_lse, draft_lse = tl.load(fields + TARGET_LSE), tl.load(fields + DRAFT_LSE)
            status = tl.load(fields + STATUS)
            if arbitrated & (status != NO_DRAFT) & (not keep):
                tl.atomic_add(counters_ptr + num_steps, tl.full((), 1, tl.int64), sem="relaxed")
            logit_top, logit_draft = tl.load(fields + LOGIT_TOP), tl.load(fields + LOGIT_DRAFT)
            cost = given_up(logit_top, logit_draft)
            if (status == OPEN) & (overrides < budget) & affordable(regret + cost, max_regret) & (not keep):
                output_position = tl.load(position_ptr + row) + 1 - tl.load(response_start_ptr + slot)
                top = tl.load(fields + TOP)
                logprob_top = -tl.load(fields + LOG_SUM)
                logprob_draft = tl.maximum(logit_draft - logit_top + logprob_top, FLOOR)
                entropy, rank, gap, extra = _target_side(
                    fields, blocks_ptr + row * (BLOCK_FIELDS + K - 1) * num_blocks, partials_ptr, row, num_blocks,
                    BLOCK_SIZE, PADDED_BLOCKS, KIND,
                )  # fmt: skip
                q_draft, q_top, q_gap, q_entropy, kl, finite = _draft_side(
                    partials_ptr, draft_ptr, slot * draft_stride_0 + i * draft_stride_1, row, draft_token, top,
                    num_blocks, PADDED_BLOCKS,
                )  # fmt: skip
                if finite:
                    lookahead, before, native_run = _surroundings(accepted, match, steps, i, PADDED_STEPS)
                    probability = 0.0
                    if COLLECT or POLICY == LEARNED:
                        x = _statistics_row(
                            logprob_draft, logprob_top, gap, entropy, rank, q_draft, q_top, q_gap, q_entropy, kl,
                            i, lookahead, before, overrides, spent, output_position, num_steps,
                        )  # fmt: skip
                    if POLICY == LEARNED:
                        probability = network_score(x, weights_ptr, HIDDEN_1, HIDDEN_2, PADDED_1, PADDED_2)
                        if scores_ptr is not None:
                            histogram = scores_ptr + slot * scores_stride_0
                            _count_score(histogram, scores_stride_1, edges_ptr, probability, EDGES, PADDED_EDGES)
                        keep = probability > _score_bound(
                            threshold_ptr, seed_ptr, slot, tl.load(position_ptr + row), SAMPLE_ACTIONS
                        )
                    else:
                        keep = rule_keeps(
                            logprob_draft, logprob_top, entropy, rank, logit_draft, logit_top, extra, kl, q_draft,
                            _joint_side(partials_ptr, row, num_blocks, PADDED_BLOCKS, JOINT),
                            tl.load(fields + RATIO), tl.load(fields + UNIFORM),
                            native_run, num_drafts - i - 1, output_position, draft_token, top.to(tl.int64),
                            first, second, seed, window, POLICY,
                        )  # fmt: skip
                    if COLLECT:
                        keep = _decided_beforehand(keep, tl.load(forced_ptr + slot), output_position)
                        _record(
                            trace_statistics_ptr, trace_action_ptr, trace_probability_ptr, row, x, keep, probability
                        )
                    if keep:
                        overrides, regret = overrides + 1, regret + cost
                        tl.atomic_add(counters_ptr + i, tl.full((), 1, tl.int64), sem="relaxed")
            # vLLM's resampling replaces the draft of a rejected row of a sampled request
            emit_draft = keep | (not greedy)
            tl.store(sampled_ptr + i, tl.where(emit_draft, draft_token, tl.load(fields + STRICT_TOKEN).to(tl.int64)))
            num_kept += keep.to(tl.int32)
            scanning = keep

    tl.store(num_sampled_ptr + request, num_kept)
    tl.store(target_lse_ptr + request, target_lse)
    tl.store(draft_lse_ptr + request, draft_lse)
    tl.store(overrides_so_far_ptr + slot, spent + overrides)
    tl.store(regret_so_far_ptr + slot, regret)
