"""What is known of a row once its tiles are combined: the strict verdict and the target's statistics.

``row_kernel`` decides as stock's rejection kernel does. On Model Runner V1 the verdict is reached elsewhere, because V1
draws its random numbers from generators, in an order of its own: stock's functions draw them, and what they drew
arrives here. For every draft there is one uniform u and one recovered token, beside the probabilities p and q it is
compared with. ``given_verdict_kernel`` compares as stock's two rejection kernels do (the draft is the argmax;
p / q >= u) and writes the outcome over what ``row_kernel`` made of the rows.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import (
    _compute_global_logprobs_and_logsumexp,
    _compute_global_target_argmax,
)

from vllm_cospec.kernels.triton.layout import (
    ACCEPTED,
    CLOSED,
    DRAFT_LSE,
    ENTROPY,
    FLOOR,
    GAP,
    INFINITY,
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
    SUM,
    TARGET_LSE,
    TILE_ARGMAX,
    TILE_INTS,
    TILE_NAN,
    TILE_RANK,
    TILE_SUMS,
    TOP,
    TOP_K_ENTROPY,
    UNIFORM,
    WEIGHTED,
)
from vllm_cospec.kernels.triton.target import is_bonus
from vllm_cospec.kernels.triton.tiles import combine


@triton.jit
def _store_verdict(row_ints_ptr, row_floats_ptr, accepted, token, ratio, uniform, target_lse, draft_lse):
    """What strict verification says of a row; ``token`` is emitted where the draft is not kept."""
    tl.store(row_ints_ptr + ACCEPTED, accepted.to(tl.int32))
    tl.store(row_ints_ptr + STRICT_TOKEN, token.to(tl.int32))
    tl.store(row_floats_ptr + RATIO, ratio)
    tl.store(row_floats_ptr + UNIFORM, uniform)
    tl.store(row_floats_ptr + TARGET_LSE, target_lse)
    tl.store(row_floats_ptr + DRAFT_LSE, draft_lse)


@triton.jit
def _store_target_statistics(
    row_ints_ptr,  # of this row, written
    row_floats_ptr,  # of this row, written
    floats_ptr,  # of this row
    ints_ptr,  # of this row
    largest,  # [PADDED_TILES] float32, of each tile
    vocab_size,
    num_tiles,
    PADDED_TILES: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Combine the tiles of a target row -> t*, whether the row has a distribution, its log-sum of exponentials."""
    tiles = tl.arange(0, PADDED_TILES)
    inside = tiles < num_tiles
    sums = tl.load(floats_ptr + (TOP_K + SUM) * num_tiles + tiles, mask=inside, other=0.0)
    weighted = tl.load(floats_ptr + (TOP_K + WEIGHTED) * num_tiles + tiles, mask=inside, other=0.0)
    highest, total, moment, _ = combine(largest, sums, weighted)
    first_nan = tl.min(tl.load(ints_ptr + TILE_NAN * num_tiles + tiles, mask=inside, other=vocab_size), axis=0)
    rank = tl.sum(tl.load(ints_ptr + TILE_RANK * num_tiles + tiles, mask=inside, other=0), axis=0)
    top = tl.load(ints_ptr + TILE_ARGMAX * num_tiles + tl.argmax(largest, axis=0))
    top = tl.where(first_nan < vocab_size, first_nan, top)  # torch.argmax takes a NaN for the maximum
    lse = highest + tl.log(total)
    tl.store(row_ints_ptr + TOP, top)
    tl.store(row_ints_ptr + RANK, rank)
    tl.store(row_floats_ptr + LOGPROB_TOP, highest - lse)
    tl.store(row_floats_ptr + ENTROPY, tl.log(total) - moment / total)
    tl.store(row_floats_ptr + LOGIT_TOP, highest)
    tl.store(row_floats_ptr + RAW_LSE, lse)
    return top, (first_nan == vocab_size) & (tl.abs(highest) < INFINITY), lse


@triton.jit
def _store_largest(
    row_floats_ptr,  # of this row, written
    floats_ptr,  # of this row
    lse,
    num_tiles,
    PADDED_TILES: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    ENTROPY_K: tl.constexpr,
):
    """From each tile's largest logits: the distance of the row's two first choices and its top-k entropy."""
    candidate = tl.arange(0, PADDED_TILES * PADDED_TOP_K)
    held = (candidate // PADDED_TOP_K < num_tiles) & (candidate % PADDED_TOP_K < TOP_K)
    values = tl.load(
        floats_ptr + (candidate % PADDED_TOP_K) * num_tiles + candidate // PADDED_TOP_K, mask=held, other=-INFINITY
    )
    gap = 0.0
    top_k_entropy = 0.0
    for k in tl.static_range(TOP_K):
        value, index = tl.max(values, axis=0, return_indices=True)
        logprob = tl.maximum(value - lse, FLOOR)
        if k < ENTROPY_K:
            top_k_entropy -= tl.exp(logprob) * logprob
        if k == 0:
            gap = logprob
        if k == 1:
            gap = tl.minimum(gap - logprob, -FLOOR)
        values = tl.where(candidate == index, -INFINITY, values)
    tl.store(row_floats_ptr + GAP, gap)
    tl.store(row_floats_ptr + TOP_K_ENTROPY, top_k_entropy)


@triton.jit
def _store_greedy_verdict(
    row_ints_ptr,
    row_floats_ptr,
    greedy_max_ptr,
    greedy_argmax_ptr,
    floats_ptr,  # of this row
    ints_ptr,
    row,
    drafted,
    num_tiles,
    PADDED_TILES: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    """Accept the draft where it is the most likely token."""
    if SEPARATE:
        argmax = _compute_global_target_argmax(
            greedy_max_ptr, num_tiles, greedy_argmax_ptr, num_tiles, row, num_tiles, PADDED_TILES
        )
    else:
        argmax = _compute_global_target_argmax(
            floats_ptr, 0, ints_ptr + TILE_ARGMAX * num_tiles, 0, row, num_tiles, PADDED_TILES
        )
    accepted = (argmax == tl.maximum(drafted, 0)) & (drafted >= 0)
    _store_verdict(row_ints_ptr, row_floats_ptr, accepted, argmax, 0.0, 1.0, 0.0, 0.0)


@triton.jit(
    do_not_specialize=["num_rows", "vocab_size", "num_blocks", "num_tiles"],
    do_not_specialize_on_alignment=["draft_sampled_ptr", "slot_ptr", "local_pos_ptr", "pos_ptr"],
)
def row_kernel(
    row_ints_ptr,  # [num_rows, ROW_INTS] int32, written
    row_floats_ptr,  # [num_rows, ROW_FLOATS] float32, written
    target_max_ptr,  # stage 1, as above
    target_sumexp_ptr,
    draft_max_ptr,
    draft_sumexp_ptr,
    greedy_max_ptr,
    greedy_argmax_ptr,
    floats_ptr,
    ints_ptr,
    raw_ptr,  # [num_rows, V]
    raw_stride,
    processed_ptr,  # [num_rows, V]
    processed_stride,
    draft_ptr,  # [slots, K, V]
    draft_stride_0,
    draft_stride_1,
    draft_sampled_ptr,  # [num_rows]
    slot_ptr,  # [num_rows]
    local_pos_ptr,  # [num_rows]
    pos_ptr,  # [num_rows] position of each row in its sequence
    temperature_ptr,  # [slots] float32, or None where the verdict is given
    seed_ptr,  # [slots] int64
    arbitrated_ptr,  # [slots] int32
    exact_tokens_ptr,  # [slots] int32
    response_start_ptr,  # [slots] int32
    num_rows,
    vocab_size,
    num_blocks,
    num_tiles,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    ENTROPY_K: tl.constexpr,
    HAS_DRAFT_LOGITS: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if is_bonus(local_pos_ptr, row, num_rows):
        return
    slot = tl.load(slot_ptr + row).to(tl.int64)
    step = tl.load(local_pos_ptr + row)
    position = tl.load(pos_ptr + row)
    drafted = tl.load(draft_sampled_ptr + row + 1).to(tl.int64)
    token = tl.maximum(drafted, 0)
    row_ints_ptr += row * ROW_INTS
    row_floats_ptr += row * ROW_FLOATS

    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    tiles = tl.arange(0, PADDED_TILES)
    inside = tiles < num_tiles
    floats_ptr += row * (TOP_K + TILE_SUMS) * num_tiles
    ints_ptr += row * TILE_INTS * num_tiles
    largest = tl.load(floats_ptr + tiles, mask=inside & arbitrated, other=-INFINITY)

    if temperature_ptr is None:  # the verdict is given and takes the place of this one
        _store_greedy_verdict(
            row_ints_ptr, row_floats_ptr, greedy_max_ptr, greedy_argmax_ptr, floats_ptr, ints_ptr, row, drafted,
            num_tiles, PADDED_TILES, SEPARATE,
        )  # fmt: skip
    else:
        temperature = tl.load(temperature_ptr + slot).to(tl.float32)
        if temperature == 0.0:
            _store_greedy_verdict(
                row_ints_ptr, row_floats_ptr, greedy_max_ptr, greedy_argmax_ptr, floats_ptr, ints_ptr, row, drafted,
                num_tiles, PADDED_TILES, SEPARATE,
            )  # fmt: skip
        else:  # as stock's rejection kernel
            uniform = tl_rand32(tl.load(seed_ptr + slot), position, includes_zero=False)
            target_logprob, draft_logprob, target_lse, draft_lse = _compute_global_logprobs_and_logsumexp(
                token, True, row, slot, step, temperature,
                processed_ptr, processed_stride, target_max_ptr, num_blocks, target_sumexp_ptr, num_blocks,
                draft_ptr, draft_stride_0, draft_stride_1, draft_max_ptr, num_blocks, draft_sumexp_ptr, num_blocks,
                num_blocks, PADDED_BLOCKS, HAS_DRAFT_LOGITS,
            )  # fmt: skip
            accepted = (target_logprob > tl.log(uniform) + draft_logprob) & (drafted >= 0)
            ratio = tl.where(draft_logprob > -INFINITY, tl.exp(target_logprob - draft_logprob), 0.0)
            _store_verdict(row_ints_ptr, row_floats_ptr, accepted, token, ratio, uniform, target_lse, draft_lse)

    if not arbitrated:
        tl.store(row_ints_ptr + STATUS, CLOSED)
        tl.store(row_ints_ptr + MATCH, 0)
        return

    top, finite, lse = _store_target_statistics(
        row_ints_ptr, row_floats_ptr, floats_ptr, ints_ptr, largest, vocab_size, num_tiles, PADDED_TILES, TOP_K
    )
    _store_largest(row_floats_ptr, floats_ptr, lse, num_tiles, PADDED_TILES, TOP_K, PADDED_TOP_K, ENTROPY_K)
    known = (drafted >= 0) & (drafted < vocab_size)
    logit_draft = tl.load(raw_ptr + row * raw_stride + token, mask=known, other=-INFINITY).to(tl.float32)
    legal = tl.load(processed_ptr + row * processed_stride + token, mask=known, other=-INFINITY).to(tl.float32)
    output_position = position + 1 - tl.load(response_start_ptr + slot)
    inexact = output_position >= tl.load(exact_tokens_ptr + slot)
    is_open = known & finite & (tl.abs(legal) < INFINITY) & inexact
    tl.store(row_ints_ptr + STATUS, tl.where(drafted < 0, NO_DRAFT, tl.where(is_open, OPEN, CLOSED)))
    tl.store(row_ints_ptr + MATCH, (top == drafted).to(tl.int32))
    tl.store(row_floats_ptr + LOGPROB_DRAFT, tl.maximum(logit_draft - lse, FLOOR))
    tl.store(row_floats_ptr + LOGIT_DRAFT, logit_draft)


@triton.jit(do_not_specialize_on_alignment=["request_ptr"])  # part of a larger tensor
def given_verdict_kernel(
    row_ints_ptr,  # [num_rows, ROW_INTS] int32, written
    row_floats_ptr,  # [num_rows, ROW_FLOATS] float32, written
    draft_ptr,  # [N] int32
    request_ptr,  # [N] int64
    accepted_ptr,  # [N] bool
    token_ptr,  # [N] int64
    legal_ptr,  # [N] bool
    ratio_ptr,  # [N] float32, or None, as the next
    uniform_ptr,  # [N] float32
):
    index = tl.program_id(0).to(tl.int64)
    row = index + tl.load(request_ptr + index)  # every request before has one row without a draft
    row_ints_ptr += row * ROW_INTS
    row_floats_ptr += row * ROW_FLOATS
    ratio = 0.0
    uniform = 1.0
    if ratio_ptr is not None:
        ratio = tl.load(ratio_ptr + index)
        uniform = tl.load(uniform_ptr + index)
    is_open = (tl.load(row_ints_ptr + STATUS) == OPEN) & (tl.load(legal_ptr + index) != 0)
    nothing = tl.load(draft_ptr + index) < 0
    tl.store(row_ints_ptr + ACCEPTED, (tl.load(accepted_ptr + index) != 0).to(tl.int32))
    tl.store(row_ints_ptr + STRICT_TOKEN, tl.load(token_ptr + index).to(tl.int32))
    tl.store(row_ints_ptr + STATUS, tl.where(nothing, NO_DRAFT, tl.where(is_open, OPEN, CLOSED)))
    tl.store(row_floats_ptr + RATIO, ratio)
    tl.store(row_floats_ptr + UNIFORM, uniform)
