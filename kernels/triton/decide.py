"""What a policy decides at one mismatch whose rows were read again, from what the stages before have left of them.

See :mod:`vllm_cospec.kernels.triton.target` for the mathematics; :mod:`vllm_cospec.kernels.triton.scan` asks.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32

from vllm_cospec.kernels.scores import SCORE_EDGES
from vllm_cospec.kernels.triton.joint import joint_statistic
from vllm_cospec.kernels.triton.layout import (
    BLOCK_FIELDS,
    BLOCK_POSITION,
    DRAFT_ENTROPY,
    DRAFT_LOGPROB_DRAFT,
    DRAFT_LOGPROB_TARGET,
    DRAFT_TOP2_GAP,
    EXTRA_STATISTIC,
    FLOOR,
    KL_DRAFT_TARGET,
    LOG_SUM,
    LOGIT_DRAFT,
    LOGIT_TOP,
    LOOKAHEAD_MATCHES,
    MATCHES_BEFORE,
    MISMATCH_FIELDS,
    NOTHING,
    OUTPUT_POSITION,
    OVERRIDES_IN_BLOCK,
    OVERRIDES_SO_FAR,
    RATIO,
    ROW_FIELDS,
    STATISTICS,
    TARGET_ENTROPY,
    TARGET_LOGPROB_DRAFT,
    TARGET_LOGPROB_TOP,
    TARGET_RANK_DRAFT,
    TARGET_TOP2_GAP,
    TOP,
    UNIFORM,
)
from vllm_cospec.kernels.triton.mismatch import draft_choices, target_choices
from vllm_cospec.kernels.triton.policies import LEARNED, network_score, rule_keeps

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


@triton.jit
def decide(
    i, row, slot,  # position of the mismatch, its row and slot
    steps, accepted, match, overrides,  # [PADDED_STEPS]; the last: made in this block before each
    spent, num_drafts,
    trace_statistics_ptr, trace_action_ptr, trace_probability_ptr,
    rows_ptr, blocks_ptr, partials_ptr,
    draft_ptr, draft_stride_0, draft_stride_1,
    drafted_ptr, position_ptr, seed_ptr, threshold_ptr, response_start_ptr,
    scores_ptr, scores_stride_0, scores_stride_1, edges_ptr,
    forced_ptr,
    network, weights_ptr,  # of the learned policy: what is kept of it, all of it
    num_blocks, num_steps,
    first, second, seed, window,
    BLOCK_SIZE: tl.constexpr, PADDED_BLOCKS: tl.constexpr, PADDED_STEPS: tl.constexpr,
    POLICY: tl.constexpr, JOINT: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr,
    COLLECT: tl.constexpr, SAMPLE_ACTIONS: tl.constexpr,
    HIDDEN_1: tl.constexpr, HIDDEN_2: tl.constexpr, PADDED_1: tl.constexpr, PADDED_2: tl.constexpr,
):  # fmt: skip
    """What a policy that rereads rows says of one mismatch; parameters are those of :func:`scan_kernel`."""
    fields = rows_ptr + row * ROW_FIELDS
    draft_token = tl.load(drafted_ptr + row + 1).to(tl.int64)
    logit_top, logit_draft = tl.load(fields + LOGIT_TOP), tl.load(fields + LOGIT_DRAFT)
    position = tl.load(position_ptr + row)
    output_position = position + 1 - tl.load(response_start_ptr + slot)
    if POLICY == LEARNED:
        bound = _score_bound(threshold_ptr, seed_ptr, slot, position, SAMPLE_ACTIONS)
    top, logprob_top = tl.load(fields + TOP), -tl.load(fields + LOG_SUM)
    logprob_draft = tl.maximum(logit_draft - logit_top + logprob_top, FLOOR)
    entropy, rank, gap = target_choices(
        partials_ptr + row * MISMATCH_FIELDS * num_blocks, blocks_ptr + row * (BLOCK_FIELDS + K - 1) * num_blocks,
        top, logit_top, -logprob_top, num_blocks, BLOCK_SIZE, PADDED_BLOCKS,
    )  # fmt: skip
    extra = 0.0
    if KIND != NOTHING:  # else nothing is written there
        extra = tl.load(fields + EXTRA_STATISTIC)
    q_draft, q_top, q_gap, q_entropy, kl, finite = _draft_side(
        partials_ptr, draft_ptr, slot * draft_stride_0 + i * draft_stride_1, row, draft_token, top,
        num_blocks, PADDED_BLOCKS,
    )  # fmt: skip
    keep = i < 0
    if finite:
        lookahead, before, native_run = _surroundings(accepted, match, steps, i, PADDED_STEPS)
        probability = 0.0
        if COLLECT or POLICY == LEARNED:
            x = _statistics_row(
                logprob_draft, logprob_top, gap, entropy, rank, q_draft, q_top, q_gap, q_entropy, kl,
                i, lookahead, before, tl.sum(tl.where(steps == i, overrides, 0), axis=0), spent, output_position,
                num_steps,
            )  # fmt: skip
        if POLICY == LEARNED:
            probability = network_score(x, network, weights_ptr, HIDDEN_1, HIDDEN_2, PADDED_1, PADDED_2)
            if scores_ptr is not None:
                histogram = scores_ptr + slot * scores_stride_0
                _count_score(histogram, scores_stride_1, edges_ptr, probability, EDGES, PADDED_EDGES)
            keep = probability > bound
        else:
            keep = rule_keeps(
                logprob_draft, logprob_top, entropy, rank, logit_draft, logit_top, extra, kl, q_draft,
                joint_statistic(partials_ptr + row * MISMATCH_FIELDS * num_blocks, num_blocks, PADDED_BLOCKS, JOINT),
                tl.load(fields + RATIO), tl.load(fields + UNIFORM), native_run, num_drafts - i - 1, output_position,
                draft_token, top.to(tl.int64), first, second, seed, window, POLICY,
            )  # fmt: skip
        if COLLECT:
            keep = _decided_beforehand(keep, tl.load(forced_ptr + slot), output_position)
            _record(trace_statistics_ptr, trace_action_ptr, trace_probability_ptr, row, x, keep, probability)
    return keep
