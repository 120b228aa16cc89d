"""What is known of a row once its blocks are combined: the strict verdict and the target's statistics.

``verdict_kernel`` decides as stock's rejection kernel does. On Model Runner V1 the verdict is reached elsewhere: V1
draws its random numbers from generators, in an order of its own, so stock's functions draw them, and the runner
compares them on the CPU and on a GPU alike. ``given_verdict_kernel`` takes that verdict as it is.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import (
    _compute_global_logprobs_and_logsumexp,
    _compute_global_target_argmax,
)

from vllm_cospec.kernels import reach
from vllm_cospec.kernels.triton.layout import (
    ACCEPTED,
    BLOCK_FIELDS,
    CLOSED,
    DRAFT_LSE,
    ENTROPY,
    EXTRA,
    EXTRA_STATISTIC,
    FLOOR,
    INFINITY,
    LOG_SUM,
    LOGIT_DRAFT,
    LOGIT_TOP,
    MATCH,
    NO_DRAFT,
    OPEN,
    PROCESSED_ARGMAX,
    PROCESSED_MAX,
    PROCESSED_SUM,
    RANK,
    RATIO,
    RAW_ARGMAX,
    RAW_MAX,
    RAW_SUM,
    ROW_FIELDS,
    SCALED_DRAFT_MAX,
    SCALED_DRAFT_SUM,
    STATUS,
    STRICT_TOKEN,
    TARGET_LSE,
    TOP,
    TOP_K,
    UNIFORM,
)
from vllm_cospec.kernels.triton.target import is_bonus, temperature_of
from vllm_cospec.kernels.triton.tiles import combine, combine_moments

STOPS = tl.constexpr(reach.STOPS)


@triton.jit
def _store_verdict(fields, accepted, token, ratio, uniform, target_lse, draft_lse):
    """What strict verification says of a row; ``token`` is emitted where the draft is not kept."""
    tl.store(fields + ACCEPTED, accepted.to(tl.float32))
    tl.store(fields + STRICT_TOKEN, token.to(tl.float32))
    tl.store(fields + RATIO, ratio)
    tl.store(fields + UNIFORM, uniform)
    tl.store(fields + TARGET_LSE, target_lse)
    tl.store(fields + DRAFT_LSE, draft_lse)


@triton.jit
def _top_k_entropy(extra_ptr, logit_top, log_sum, num_blocks, PADDED_BLOCKS: tl.constexpr, K: tl.constexpr):
    """-sum p log p over the K most likely tokens, from each block's K largest logits."""
    candidate = tl.arange(0, PADDED_BLOCKS * triton.next_power_of_2(K))
    block, place = candidate % PADDED_BLOCKS, candidate // PADDED_BLOCKS
    held = (block < num_blocks) & (place < K)
    values = tl.load(extra_ptr + place * num_blocks + block, mask=held, other=-INFINITY)
    entropy = 0.0
    for _ in tl.static_range(K):
        value, index = tl.max(values, axis=0, return_indices=True)
        logprob = tl.maximum(value - logit_top - log_sum, FLOOR)
        entropy -= tl.exp(logprob) * logprob
        values = tl.where(candidate == index, -INFINITY, values)
    return entropy


@triton.jit
def _store_statistics(
    fields,  # of the row, written
    blocks,  # of the row
    drafted,  # d
    logit_draft,  # z_d
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
):
    """Combine the blocks of a raw target row -> whether it has a distribution."""
    block = tl.arange(0, PADDED_BLOCKS)
    inside = block < num_blocks
    largest = tl.load(blocks + RAW_MAX * num_blocks + block, mask=inside, other=-INFINITY)
    sums = tl.load(blocks + RAW_SUM * num_blocks + block, mask=inside, other=0.0)
    places = tl.load(blocks + RAW_ARGMAX * num_blocks + block, mask=inside, other=0.0)
    logit_top, total, factor = combine(largest, sums)
    log_sum = tl.log(total)
    first = tl.min(tl.where(largest == logit_top, block, PADDED_BLOCKS - 1), axis=0)
    top = tl.sum(tl.where(block == first, places, 0.0), axis=0)
    # NaN anywhere, +inf, nothing finite: such a row has no distribution, no first choice, and matches nothing
    finite = (total > 0.0) & (total < INFINITY)
    tl.store(fields + MATCH, ((top.to(tl.int32) == drafted) & finite).to(tl.float32))
    tl.store(fields + TOP, top)
    tl.store(fields + LOGIT_TOP, logit_top)
    tl.store(fields + LOGIT_DRAFT, logit_draft)
    tl.store(fields + LOG_SUM, log_sum)
    extra_ptr = blocks + EXTRA * num_blocks
    if KIND == ENTROPY:
        moments = tl.load(extra_ptr + block, mask=inside, other=0.0)
        moment = combine_moments(largest, sums, moments, logit_top, factor)
        tl.store(fields + EXTRA_STATISTIC, log_sum - moment / total)
    if KIND == RANK:
        ranks = tl.load(extra_ptr + block, mask=inside, other=0.0)
        tl.store(fields + EXTRA_STATISTIC, tl.sum(ranks, axis=0))
    if KIND == TOP_K:
        entropy = _top_k_entropy(extra_ptr, logit_top, log_sum, num_blocks, PADDED_BLOCKS, K)
        tl.store(fields + EXTRA_STATISTIC, entropy)
    return finite


@triton.jit
def _undeliverable(
    ends_ptr,  # [slots, 1 + STOPS] int32
    slot,
    drafted_ptr,  # [num_rows]
    row,
    step,  # of the row in its request
    output_position,
    PADDED_STEPS: tl.constexpr,
):
    """Whether a row's token cannot reach the response, as :func:`vllm_cospec.kernels.reach.undeliverable` says."""
    ends_ptr += slot * (1 + STOPS)
    place = tl.arange(0, PADDED_STEPS)
    before = place < step
    tokens = tl.load(drafted_ptr + row - place, mask=before, other=0).to(tl.int32)
    stops = tl.load(ends_ptr + 1 + tl.arange(0, STOPS))
    ended = tl.sum(tl.sum(((tokens[:, None] == stops[None, :]) & before[:, None]).to(tl.int32), axis=1), axis=0)
    return (output_position >= tl.load(ends_ptr)) | (ended > 0)


@triton.jit(
    do_not_specialize=["num_rows", "num_blocks"],
    do_not_specialize_on_alignment=["drafted_ptr", "slot_ptr", "step_ptr", "position_ptr"],
)
def verdict_kernel(
    rows_ptr,  # [num_rows, ROW_FIELDS] float32, written
    blocks_ptr,  # [num_rows, BLOCK_FIELDS + K - 1, num_blocks] float32
    raw_ptr,  # [num_rows, V]
    raw_stride,
    processed_ptr,  # [num_rows, V]
    processed_stride,
    draft_ptr,  # [slots, K, V]
    draft_stride_0,
    draft_stride_1,
    drafted_ptr,  # [num_rows]
    slot_ptr,  # [num_rows]
    step_ptr,  # [num_rows]
    position_ptr,  # [num_rows] of each row in its sequence
    temperature_ptr,  # [slots] float32
    seed_ptr,  # [slots] int64
    arbitrated_ptr,  # [slots] int32
    exact_tokens_ptr,  # [slots] int32
    response_start_ptr,  # [slots] int32
    ends_ptr,  # [slots, 1 + STOPS] int32
    num_rows,
    vocab_size,
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_STEPS: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
    HAS_DRAFT_LOGITS: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    # What is read is asked for before it is known whether it is needed: else reads would wait for one another.
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    step = tl.load(step_ptr + row)
    position = tl.load(position_ptr + row)
    drafted = tl.load(drafted_ptr + row + 1, mask=row + 1 < num_rows, other=-1).to(tl.int64)
    if is_bonus(step_ptr, row, num_rows):
        return
    greedy, temperature = temperature_of(temperature_ptr, slot)
    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    token = tl.maximum(drafted, 0)
    known = (drafted >= 0) & (drafted < vocab_size)
    logit_draft = tl.load(raw_ptr + row * raw_stride + token, mask=known, other=-INFINITY).to(tl.float32)
    legal = tl.load(processed_ptr + row * processed_stride + token, mask=known, other=-INFINITY).to(tl.float32)
    output_position = position + 1 - tl.load(response_start_ptr + slot)
    inexact = output_position >= tl.load(exact_tokens_ptr + slot)
    undeliverable = _undeliverable(ends_ptr, slot, drafted_ptr, row, step, output_position, PADDED_STEPS)
    fields = rows_ptr + row * ROW_FIELDS
    blocks = blocks_ptr + row * (BLOCK_FIELDS + K - 1) * num_blocks

    if greedy:
        argmax = _compute_global_target_argmax(
            blocks + (PROCESSED_MAX if SEPARATE else RAW_MAX) * num_blocks, 0,
            blocks + (PROCESSED_ARGMAX if SEPARATE else RAW_ARGMAX) * num_blocks, 0,
            row, num_blocks, PADDED_BLOCKS,
        )  # fmt: skip
        accepted = (argmax == token) & (drafted >= 0)
        _store_verdict(fields, accepted, argmax, 0.0, 1.0, 0.0, 0.0)
    else:  # as stock's rejection kernel
        uniform = tl_rand32(tl.load(seed_ptr + slot), position, includes_zero=False)
        target_logprob, draft_logprob, target_lse, draft_lse = _compute_global_logprobs_and_logsumexp(
            token, True, row, slot, step, temperature,
            processed_ptr, processed_stride,
            blocks + PROCESSED_MAX * num_blocks, 0, blocks + PROCESSED_SUM * num_blocks, 0,
            draft_ptr, draft_stride_0, draft_stride_1,
            blocks + SCALED_DRAFT_MAX * num_blocks, 0, blocks + SCALED_DRAFT_SUM * num_blocks, 0,
            num_blocks, PADDED_BLOCKS, HAS_DRAFT_LOGITS,
        )  # fmt: skip
        accepted = (target_logprob > tl.log(uniform) + draft_logprob) & (drafted >= 0)
        ratio = tl.where(draft_logprob > -INFINITY, tl.exp(target_logprob - draft_logprob), 0.0)
        _store_verdict(fields, accepted, token, ratio, uniform, target_lse, draft_lse)

    if not arbitrated:
        tl.store(fields + STATUS, CLOSED)
        tl.store(fields + MATCH, 0.0)
        return
    finite = _store_statistics(fields, blocks, drafted, logit_draft, num_blocks, PADDED_BLOCKS, KIND, K)
    is_open = known & finite & (tl.abs(legal) < INFINITY) & inexact
    nothing = (drafted < 0) | undeliverable
    tl.store(fields + STATUS, tl.where(nothing, NO_DRAFT, tl.where(is_open, OPEN, CLOSED)).to(tl.float32))


@triton.jit(
    do_not_specialize=["num_blocks"],
    do_not_specialize_on_alignment=["drafted_ptr", "step_ptr", "request_slot_ptr", "request_ptr", "position_ptr"],
)
def given_verdict_kernel(
    rows_ptr,  # [num_rows, ROW_FIELDS] float32, written
    blocks_ptr,  # [num_rows, BLOCK_FIELDS + K - 1, num_blocks] float32
    raw_ptr,  # [num_rows, V]
    raw_stride,
    drafted_ptr,  # [num_rows]
    step_ptr,  # [num_rows]
    request_slot_ptr,  # [B]
    position_ptr,  # [num_rows]
    draft_ptr,  # [N] int32
    request_ptr,  # [N] int64
    accepted_ptr,  # [N] bool
    token_ptr,  # [N] int64
    legal_ptr,  # [N] bool
    ratio_ptr,  # [N] float32, or None, as the next
    uniform_ptr,  # [N] float32
    arbitrated_ptr,  # [S] int32
    exact_tokens_ptr,  # [S] int32
    response_start_ptr,  # [S] int32
    ends_ptr,  # [S, 1 + STOPS] int32
    vocab_size,
    num_blocks,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_STEPS: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    request = tl.load(request_ptr + index)
    row = index + request  # every request before has one row without a draft
    slot = tl.load(request_slot_ptr + request).to(tl.int64)
    fields = rows_ptr + row * ROW_FIELDS
    ratio = 0.0
    uniform = 1.0
    if ratio_ptr is not None:
        ratio = tl.load(ratio_ptr + index)
        uniform = tl.load(uniform_ptr + index)
    accepted = tl.load(accepted_ptr + index) != 0
    _store_verdict(fields, accepted, tl.load(token_ptr + index), ratio, uniform, 0.0, 0.0)
    if tl.load(arbitrated_ptr + slot) == 0:
        tl.store(fields + STATUS, CLOSED)
        tl.store(fields + MATCH, 0.0)
        return
    token = tl.load(draft_ptr + index).to(tl.int64)
    known = (token >= 0) & (token < vocab_size)
    logit_draft = tl.load(raw_ptr + row * raw_stride + token, mask=known, other=-INFINITY).to(tl.float32)
    finite = _store_statistics(
        fields, blocks_ptr + row * (BLOCK_FIELDS + K - 1) * num_blocks, token, logit_draft, num_blocks, PADDED_BLOCKS,
        KIND, K,
    )  # fmt: skip
    output_position = tl.load(position_ptr + row) + 1 - tl.load(response_start_ptr + slot)
    inexact = output_position >= tl.load(exact_tokens_ptr + slot)
    legal = (tl.load(legal_ptr + index) != 0) & (tl.abs(logit_draft) < INFINITY)
    step = tl.load(step_ptr + row)
    nothing = (token < 0) | _undeliverable(ends_ptr, slot, drafted_ptr, row, step, output_position, PADDED_STEPS)
    status = tl.where(nothing, NO_DRAFT, tl.where(known & finite & legal & inexact, OPEN, CLOSED))
    tl.store(fields + STATUS, status.to(tl.float32))
