"""The last stage of arbitration: the walk through each block.

See :mod:`vllm_cospec.kernels.triton.target` for the mathematics and the order of the stages.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.triton.decide import decide
from vllm_cospec.kernels.triton.layout import (
    ACCEPTED,
    DRAFT_LSE,
    EXTRA_STATISTIC,
    FLOOR,
    LOG_SUM,
    LOGIT_DRAFT,
    LOGIT_TOP,
    MATCH,
    NO_DRAFT,
    NOTHING,
    OPEN,
    RATIO,
    ROW_FIELDS,
    STATUS,
    STRICT_TOKEN,
    TARGET_LSE,
    TOP,
    UNIFORM,
)
from vllm_cospec.kernels.triton.mismatch import candidates_of
from vllm_cospec.kernels.triton.policies import LEARNED, network_weights, rule_keeps
from vllm_cospec.kernels.triton.target import place_of, temperature_of


@triton.jit
def _rule_keeps_of(
    fields,  # [PADDED_STEPS] of each row
    logit_top, logit_draft,  # [PADDED_STEPS]
    accepted,  # [PADDED_STEPS] float32, strict verification's verdicts
    steps, present,  # [PADDED_STEPS]
    num_drafts,
    output_position,  # [PADDED_STEPS]
    draft_token,  # [PADDED_STEPS]
    first, second, seed, window,
    PADDED_STEPS: tl.constexpr,
    KIND: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """What a rule that knows enough from the first pass says of every position at once, bool [PADDED_STEPS]."""
    logprob_top = -tl.load(fields + LOG_SUM, mask=present, other=0.0)
    logprob_draft = tl.maximum(logit_draft - logit_top + logprob_top, FLOOR)
    extra = tl.zeros((PADDED_STEPS,), tl.float32)
    if KIND != NOTHING:  # else nothing is written there; a rule reads one of these at most
        extra = tl.load(fields + EXTRA_STATISTIC, mask=present, other=0.0)
    stopping = (steps[None, :] > steps[:, None]) & (accepted == 0.0)[None, :]
    native_run = tl.min(tl.where(stopping, steps[None, :], PADDED_STEPS), axis=1) - steps - 1
    return rule_keeps(
        logprob_draft, logprob_top, extra, extra, logit_draft, logit_top, extra, 0.0, 0.0, 0.0,
        tl.load(fields + RATIO, mask=present, other=0.0), tl.load(fields + UNIFORM, mask=present, other=1.0),
        native_run, num_drafts - steps - 1, output_position, draft_token,
        tl.load(fields + TOP, mask=present, other=0.0).to(tl.int64), first, second, seed, window, POLICY,
    )  # fmt: skip


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
    stops_ptr,  # [slots] int32, added to: blocks that ended at a mismatch
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
    stops = tl.load(stops_ptr + slot)
    sampled_ptr += request * sampled_stride

    # A policy comes to a position when all before it are kept, so what it knows there of the block is known beforehand.
    steps = tl.arange(0, PADDED_STEPS)
    present = steps < num_drafts
    rows = start + steps
    fields = rows_ptr + rows * ROW_FIELDS
    accepted = tl.load(fields + ACCEPTED, mask=present, other=0.0)
    status = tl.load(fields + STATUS, mask=present, other=NO_DRAFT)
    strict_token = tl.load(fields + STRICT_TOKEN, mask=present, other=0.0).to(tl.int64)
    target_lse = tl.load(fields + TARGET_LSE, mask=present, other=0.0)
    draft_lse = tl.load(fields + DRAFT_LSE, mask=present, other=0.0)
    logit_top = tl.load(fields + LOGIT_TOP, mask=present, other=0.0)
    logit_draft = tl.load(fields + LOGIT_DRAFT, mask=present, other=0.0)
    drafted = tl.load(drafted_ptr + rows + 1, mask=present, other=-1).to(tl.int64)
    rejected = present & (accepted == 0.0)
    candidates, overrides, cost = candidates_of(
        rejected, status == OPEN, logit_top, logit_draft, steps, budget, regret, max_regret, PADDED_STEPS
    )

    if partials_ptr is None:
        output_position = tl.load(position_ptr + rows, mask=present, other=0) + 1 - tl.load(response_start_ptr + slot)
        override = candidates & _rule_keeps_of(
            fields, logit_top, logit_draft, accepted, steps, present, num_drafts, output_position, drafted,
            first, second, seed, window, PADDED_STEPS, KIND, POLICY,
        )  # fmt: skip
    else:
        override = steps < 0
        network = None
        if POLICY == LEARNED:
            network = network_weights(weights_ptr, HIDDEN_1, HIDDEN_2, PADDED_1, PADDED_2)
        match = tl.load(fields + MATCH, mask=present, other=0.0)
        i = tl.min(tl.where(candidates, steps, PADDED_STEPS), axis=0)
        while i < PADDED_STEPS:
            keep = decide(
                i, start + i, slot, steps, accepted, match, overrides, spent, num_drafts,
                trace_statistics_ptr, trace_action_ptr, trace_probability_ptr, rows_ptr, blocks_ptr, partials_ptr,
                draft_ptr, draft_stride_0, draft_stride_1, drafted_ptr, position_ptr, seed_ptr, threshold_ptr,
                response_start_ptr, scores_ptr, scores_stride_0, scores_stride_1, edges_ptr, forced_ptr,
                network, weights_ptr, num_blocks, num_steps, first, second, seed, window, BLOCK_SIZE, PADDED_BLOCKS,
                PADDED_STEPS, POLICY, JOINT, KIND, K, COLLECT, SAMPLE_ACTIONS, HIDDEN_1, HIDDEN_2, PADDED_1, PADDED_2,
            )  # fmt: skip
            override = override | (steps == tl.where(keep, i, PADDED_STEPS))
            i = tl.where(keep, tl.min(tl.where(candidates & (steps > i), steps, PADDED_STEPS), axis=0), PADDED_STEPS)

    kept = (accepted != 0.0) | override
    num_kept = tl.min(tl.where(present & ~kept, steps, num_drafts), axis=0)
    override = override & (steps < num_kept)
    reached = present & (steps <= num_kept)
    if arbitrated:
        found = reached & rejected & (status != NO_DRAFT)
        mismatches = tl.sum(found.to(tl.int32), axis=0)
        if mismatches > 0:
            tl.atomic_add(counters_ptr + num_steps, mismatches.to(tl.int64), sem="relaxed")
            ones = tl.full((PADDED_STEPS,), 1, tl.int64)
            tl.atomic_add(counters_ptr + steps, ones, mask=override, sem="relaxed")
            made = tl.sum(override.to(tl.int32), axis=0)
            tl.store(overrides_so_far_ptr + slot, spent + made)
            tl.store(regret_so_far_ptr + slot, regret + tl.sum(tl.where(override, cost, 0.0), axis=0))
            tl.store(stops_ptr + slot, stops + mismatches - made)
    # vLLM's resampling replaces the draft of a rejected row of a sampled request
    tl.store(sampled_ptr + steps, tl.where(kept | (not greedy), drafted, strict_token), mask=reached)
    tl.store(num_sampled_ptr + request, num_kept)
    last = steps == tl.minimum(num_kept, num_drafts - 1)
    tl.store(target_lse_ptr + request, tl.sum(tl.where(last, target_lse, 0.0), axis=0))
    tl.store(draft_lse_ptr + request, tl.sum(tl.where(last, draft_lse, 0.0), axis=0))
