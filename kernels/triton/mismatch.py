"""Target and draft row of a rejected position, read side by side: what the first pass has not kept of them.

The mathematics stands in :mod:`vllm_cospec.kernels.triton.target`. Which positions a policy comes to depends on what it
decides at those before; all that it may come to are read at once, so that the scan never waits for a row.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.regret import REGRET_UNIT
from vllm_cospec.kernels.triton.layout import (
    ACCEPTED,
    CROSS,
    DRAFT_MAX,
    DRAFT_MOMENT,
    DRAFT_SECOND,
    DRAFT_SUM,
    FLOOR,
    INFINITY,
    LOG_SUM,
    LOGIT_DRAFT,
    LOGIT_TOP,
    MISMATCH_FIELDS,
    MOMENT,
    OPEN,
    RANK_IN_BLOCK,
    RAW_MAX,
    ROW_FIELDS,
    SECOND,
    STATUS,
    TOP,
)
from vllm_cospec.kernels.triton.target import place_of
from vllm_cospec.kernels.triton.tiles import LOG2_E, aligned, base_of, combine, combine_moments, exp, load_logits

_REGRET_UNIT = tl.constexpr(REGRET_UNIT)
_TILE = tl.constexpr(2048)  # of bfloat16, 16 bytes for each thread


@triton.jit
def given_up(logit_top, logit_draft):
    """Nats that keeping a draft gives up, rounded up to a unit."""
    return tl.ceil((logit_top - logit_draft) / _REGRET_UNIT) * _REGRET_UNIT


@triton.jit
def affordable(regret, max_regret):
    """Whether a budget has room for so many nats in all. Where it is 0 it has none, ties included."""
    return regret <= tl.where(max_regret > 0, max_regret, -1.0)


@triton.jit
def _two_largest(first, second, other_first, other_second):
    """Merge two pairs of largest values."""
    rest = tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))
    return tl.maximum(first, other_first), rest


@triton.jit
def _second_largest_of(values, SIZE: tl.constexpr):
    """The second of the largest of [SIZE] values; neighbours, which a thread holds, are merged as whole vectors."""
    one, other = tl.split(tl.reshape(values, (SIZE // 2, 2)))
    first, second = tl.maximum(one, other), tl.minimum(one, other)
    for level in tl.static_range(2):
        one, other = tl.split(tl.reshape(first, (SIZE // 4 >> level, 2)))
        one_second, other_second = tl.split(tl.reshape(second, (SIZE // 4 >> level, 2)))
        first, second = _two_largest(one, one_second, other, other_second)
    _, second = tl.reduce((first, second), 0, _two_largest)
    return second


@triton.jit
def _four_sums(a, b, c, d):
    """The sums of four vectors; taken together they pass between warps at once."""
    of_ab, of_cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))
    of_a, of_b = tl.split(of_ab)
    of_c, of_d = tl.split(of_cd)
    return of_a, of_b, of_c, of_d


@triton.jit
def candidates_of(
    rejected,  # [PADDED_STEPS] bool, by strict verification
    is_open,  # [PADDED_STEPS] bool, to the policy
    logit_top,  # [PADDED_STEPS]
    logit_draft,  # [PADDED_STEPS]
    steps,  # [PADDED_STEPS]
    budget,  # overrides that the request has left
    regret,  # that it has spent
    max_regret,
    PADDED_STEPS: tl.constexpr,
):
    """Positions the policy may come to: rejected, open, and paid for, as all rejected before them are.

    It comes to a position when all before it are kept: every rejected draft before has been overridden, and has spent
    of the budgets. -> bool, overrides before each position, what each costs of the regret; all [PADDED_STEPS].
    """
    cost = tl.where(rejected, given_up(logit_top, logit_draft), 0.0)
    overrides = tl.cumsum(rejected.to(tl.int32), axis=0) - rejected.to(tl.int32)
    is_open = is_open & (overrides < budget) & affordable(regret + tl.cumsum(cost, axis=0), max_regret)
    end = tl.min(tl.where(rejected & ~is_open, steps, PADDED_STEPS), axis=0)
    return rejected & (steps < end), overrides, cost


@triton.jit
def own_candidates(
    slot,
    start,  # first row of the request
    num_drafts,
    rows_ptr,  # [num_rows, ROW_FIELDS] float32
    max_overrides_ptr,  # [slots] int32
    overrides_so_far_ptr,  # [slots] int32
    max_regret_ptr,  # [slots] float32
    regret_so_far_ptr,  # [slots] float32
    PADDED_STEPS: tl.constexpr,
):
    """This program's share of the positions that the policy may come to, bool [PADDED_STEPS].

    Programs along the third axis of the grid take turns.
    """
    steps = tl.arange(0, PADDED_STEPS)
    present = steps < num_drafts
    fields = rows_ptr + (start + steps) * ROW_FIELDS
    candidates, before, _ = candidates_of(
        present & (tl.load(fields + ACCEPTED, mask=present, other=1.0) == 0.0),
        tl.load(fields + STATUS, mask=present, other=0.0) == OPEN,
        tl.load(fields + LOGIT_TOP, mask=present, other=0.0),
        tl.load(fields + LOGIT_DRAFT, mask=present, other=0.0),
        steps,
        tl.load(max_overrides_ptr + slot) - tl.load(overrides_so_far_ptr + slot),
        tl.load(regret_so_far_ptr + slot),
        tl.load(max_regret_ptr + slot),
        PADDED_STEPS,
    )
    return candidates & (before % tl.num_programs(2) == tl.program_id(2))


@triton.jit
def _next_below(x):
    """The largest float32 below a finite one."""
    bits = x.to(tl.int32, bitcast=True)
    below = tl.where(bits > 0, bits - 1, bits + 1)
    below = tl.where((bits == 0) | (bits == -(2**31)), -(2**31) + 1, below)  # of both zeros
    return below.to(tl.float32, bitcast=True)


@triton.jit
def _rank_in_block(
    logits,  # [BLOCK_SIZE]
    logit,  # of the token that is ranked
    token,
    row_ptr,  # [V] where the logits are from
    start,  # first token of the block
    vocab_size,
    width,
    BLOCK_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """How many tokens of the block come before a token: larger ones, and equals whose number is smaller.

    Only in the token's own block have equals to be told apart; elsewhere all of them come before it, or none.
    """
    bound = tl.where(token < start + BLOCK_SIZE, logit, _next_below(logit))
    rank = tl.sum(tl.where(logits > bound, 1.0, 0.0), axis=0)
    if (token >= start) & (token < start + BLOCK_SIZE):
        # The numbers of all logits in registers would push others out: those before the token are read once more.
        equal = tl.zeros((_TILE,), tl.float32)
        for tile in range(start, token, _TILE):
            offsets = tile + tl.arange(0, _TILE)
            again = load_logits(row_ptr, offsets, vocab_size, width, PADDED)
            equal += tl.where((again == logit) & (offsets < token), 1.0, 0.0)
        rank += tl.sum(equal, axis=0)
    return rank


@triton.jit(
    do_not_specialize=["num_blocks"],
    do_not_specialize_on_alignment=["first_ptr", "request_slot_ptr", "drafted_ptr"],
)
def mismatch_kernel(
    partials_ptr,  # [num_rows, MISMATCH_FIELDS, num_blocks] float32, written where the policy may come to
    rows_ptr,  # [num_rows, ROW_FIELDS] float32
    raw_ptr,  # [num_rows, V]
    raw_stride,
    raw_width,
    draft_ptr,  # [slots, K, V], or None
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
    BLOCK_SIZE: tl.constexpr,
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
    offsets = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    while position < PADDED_STEPS:
        row = start + position
        fields = rows_ptr + row * ROW_FIELDS
        partials = partials_ptr + row * MISMATCH_FIELDS * num_blocks + block
        raw_row_ptr = raw_ptr + row * aligned(raw_stride, UNIT)
        logits = load_logits(raw_row_ptr, offsets, vocab_size, aligned(raw_width, UNIT), PADDED)
        if draft_ptr is not None:
            draft_row_ptr = draft_ptr + slot * aligned(draft_stride_0, UNIT) + position * aligned(draft_stride_1, UNIT)
            draft = load_logits(draft_row_ptr, offsets, vocab_size, aligned(draft_width, UNIT), PADDED)
        # Both blocks stay in registers. Without the barrier, and with what they are compared with read before it,
        # compilers ask for half of them only when the other half has come.
        tl.debug_barrier()
        token = tl.load(drafted_ptr + row + 1).to(tl.int32)
        top, logit_top = tl.load(fields + TOP).to(tl.int32), tl.load(fields + LOGIT_TOP)
        logit_draft, log_sum = tl.load(fields + LOGIT_DRAFT), tl.load(fields + LOG_SUM) * LOG2_E
        if draft_ptr is not None:
            chosen = tl.load(draft_row_ptr + token).to(tl.float32)
        rank = _rank_in_block(
            logits, logit_draft, token, raw_row_ptr, block * BLOCK_SIZE, vocab_size,
            aligned(raw_width, UNIT), BLOCK_SIZE, PADDED,
        )  # fmt: skip
        tl.store(partials + RANK_IN_BLOCK * num_blocks, rank)
        if top // BLOCK_SIZE == block:  # of the other blocks it is known
            tl.store(partials + SECOND * num_blocks, _second_largest_of(logits, BLOCK_SIZE))
        if draft_ptr is not None:
            largest = tl.max(draft, axis=0)
            second = -INFINITY
            if largest >= chosen:  # else the row's first choice is in another block, and the second no less than this
                second = _second_largest_of(draft, BLOCK_SIZE)
        # logarithms to the base of 2 until they are summed, which spares a multiplication for every logit
        logprob = tl.maximum((logits - logit_top) * LOG2_E - log_sum, FLOOR * LOG2_E)
        moment = tl.exp2(logprob) * logprob
        if draft_ptr is None:
            tl.store(partials + MOMENT * num_blocks, tl.sum(moment, axis=0) / LOG2_E)
        else:
            shifted = draft - base_of(largest)
            weight = exp(shifted)
            # below the floor a term is nil, and 0 x -inf is not
            moment, draft_sum, draft_moment, cross = _four_sums(
                moment, weight, weight * tl.maximum(shifted, FLOOR), weight * logprob
            )
            tl.store(partials + MOMENT * num_blocks, moment / LOG2_E)
            tl.store(partials + DRAFT_MAX * num_blocks, largest)
            tl.store(partials + DRAFT_SECOND * num_blocks, second)
            tl.store(partials + DRAFT_SUM * num_blocks, draft_sum)
            tl.store(partials + DRAFT_MOMENT * num_blocks, draft_moment)
            tl.store(partials + CROSS * num_blocks, cross / LOG2_E)
        position = tl.min(tl.where(candidates & (steps > position), steps, PADDED_STEPS), axis=0)


@triton.jit
def target_choices(
    partials_ptr,  # [MISMATCH_FIELDS, num_blocks] float32 of one row
    blocks_ptr,  # [BLOCK_FIELDS, num_blocks] float32 of the row
    top,  # t*
    logit_top,  # z_{t*}
    log_sum,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    """Combine the blocks of a target row -> entropy, rank of d, distance of the two first choices."""
    block = tl.arange(0, PADDED_BLOCKS)
    inside = block < num_blocks
    entropy = -tl.sum(tl.load(partials_ptr + MOMENT * num_blocks + block, mask=inside, other=0.0), axis=0)
    rank = tl.sum(tl.load(partials_ptr + RANK_IN_BLOCK * num_blocks + block, mask=inside, other=0.0), axis=0)
    others = tl.load(blocks_ptr + RAW_MAX * num_blocks + block, mask=inside, other=-INFINITY)
    own = top.to(tl.int32) // BLOCK_SIZE
    others = tl.max(tl.where(block == own, -INFINITY, others), axis=0)
    second = tl.maximum(others, tl.load(partials_ptr + SECOND * num_blocks + own))
    gap = tl.minimum(-log_sum - tl.maximum(second - logit_top - log_sum, FLOOR), -FLOOR)
    return entropy, rank, gap


@triton.jit
def draft_choices(
    partials_ptr,  # [MISMATCH_FIELDS, num_blocks] float32 of one row
    logit_draft,  # y_d
    logit_top,  # y_{t*}
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
):
    """Combine the blocks of a draft row -> log q(d), log q(t*), gap, entropy, KL(q || p), whether it is sound."""
    block = tl.arange(0, PADDED_BLOCKS)
    inside = block < num_blocks
    largest = tl.load(partials_ptr + DRAFT_MAX * num_blocks + block, mask=inside, other=-INFINITY)
    seconds = tl.load(partials_ptr + DRAFT_SECOND * num_blocks + block, mask=inside, other=-INFINITY)
    sums = tl.load(partials_ptr + DRAFT_SUM * num_blocks + block, mask=inside, other=0.0)
    moments = tl.load(partials_ptr + DRAFT_MOMENT * num_blocks + block, mask=inside, other=0.0)
    cross = tl.load(partials_ptr + CROSS * num_blocks + block, mask=inside, other=0.0)
    highest, total, factor = combine(largest, sums)
    moment = combine_moments(largest, sums, moments, highest, factor)
    _, second = tl.reduce((largest, seconds), 0, _two_largest)
    log_total = tl.log(total)
    gap = tl.minimum(-log_total - tl.maximum(second - highest - log_total, FLOOR), -FLOOR)
    entropy = log_total - moment / total
    kl = moment / total - log_total - tl.sum(factor * cross, axis=0) / total
    kl = tl.minimum(tl.maximum(kl, 0.0), -FLOOR)
    finite = (total > 0.0) & (total < INFINITY)
    q_draft = tl.maximum(logit_draft - highest - log_total, FLOOR)
    q_top = tl.maximum(logit_top - highest - log_total, FLOOR)
    return q_draft, q_top, gap, entropy, kl, finite
