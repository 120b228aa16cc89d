"""Fused verification of draft tokens on a GPU: strict verdicts, statistics, policy and scan, in Triton.

For a row of target logits z over V tokens, with M = max z, and a draft token d, one pass over tiles of the vocabulary
keeps per tile b

    m_b = max z,  s_b = sum exp(z - m_b),  w_b = sum exp(z - m_b) (z - m_b),  the largest two or more z,
    the argmax,  r_b = how many tokens stand before d,  the index of the first NaN

and from these few numbers follow, with e_b = exp(m_b - M), S = sum e_b s_b, W = sum e_b (w_b + (m_b - M) s_b),

    log sum exp z = M + log S,     entropy = log S - W / S,     rank of d = sum r_b.

At a mismatch the draft's row y is read the same way, beside the target's row for one more sum,
c_b = sum exp(y - m_b) max(log p, floor), so that KL(q || p) = W / S - log S - C / S with C = sum e_b c_b. Nothing of
the size of the logits is ever written.

The stages, one launch each, and what each reads of the logits:

1. ``target_statistics_kernel``, a program per (row, block of tiles): every target row once; the rows of sampled
   requests also as strict verification needs them, with the draft's row at the request's temperature.
2. ``row_kernel``, a program per row: combines the tiles, decides as strict verification does.
3. ``draft_statistics_kernel``, a program per (request, tile): at the request's first mismatch only, the draft's and
   the target's row. Launched when the policy looks at the draft's distribution.
4. ``scan_kernel``, a program per request: walks the block, consults the policy, emits. Behind an override a further
   mismatch needs a draft row that could not be foreseen; the program reads it itself.
5. vLLM's own resampling kernels draw the one token of each request that is not a draft.

The strict verdict comes from vLLM's device functions, with its block sizes and its stateless random numbers, so strict
requests get what stock verification gives them. Every result depends on the request's own rows alone. Integers
that vary from step to step are run-time arguments that nothing is specialised on; choices are ``constexpr``.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import (
    _compute_global_logprobs_and_logsumexp,
    _compute_global_target_argmax,
    _compute_max_and_sumexp,
)

from vllm_cospec.kernels.statistics import LOGPROB_FLOOR

FLOOR = tl.constexpr(LOGPROB_FLOOR)
INFINITY = tl.constexpr(float("inf"))

# Fields of the partials of a target row's tile: TOP_K largest logits, then these two; and three integers.
SUM, WEIGHTED = map(tl.constexpr, range(2))
TILE_ARGMAX, TILE_RANK, TILE_NAN, TILE_INTS = map(tl.constexpr, range(4))
# Fields of the partials of a draft row's tile.
DRAFT_MAX, DRAFT_SECOND, DRAFT_SUM, DRAFT_WEIGHTED, DRAFT_CROSS, DRAFT_NAN, DRAFT_FIELDS = map(tl.constexpr, range(7))
# What is known of a row once its tiles are combined.
ACCEPTED, MATCH, STATUS, STRICT_TOKEN, TOP, RANK, ROW_INTS = map(tl.constexpr, range(7))
# Status of a row. OPEN: the policy may decide here, were the budget not spent; NO_DRAFT: nothing was proposed here.
CLOSED, OPEN, NO_DRAFT = map(tl.constexpr, range(3))
LOGPROB_DRAFT, LOGPROB_TOP, GAP, ENTROPY, TOP_K_ENTROPY, LOGIT_DRAFT, LOGIT_TOP = map(tl.constexpr, range(7))
RATIO, UNIFORM, RAW_LSE, TARGET_LSE, DRAFT_LSE, ROW_FLOATS = map(tl.constexpr, range(7, 13))


@triton.jit
def _is_bonus(local_pos_ptr, row, num_rows):
    """The last row of a request has no draft: the next row starts another request."""
    return tl.load(local_pos_ptr + row + 1, mask=row + 1 < num_rows, other=0) == 0


@triton.jit
def _sums(logits):
    """m, sum exp(z - m), sum exp(z - m) (z - m) of one tile, and exp(z - m); NaN counts as absent."""
    largest = tl.max(logits, axis=0)
    base = tl.where(largest > -INFINITY, largest, 0.0)
    shifted = logits - base
    weight = tl.exp(shifted)
    # below the floor a term is nil, and 0 x -inf is not
    return largest, tl.sum(weight, axis=0), tl.sum(weight * tl.maximum(shifted, FLOOR), axis=0), weight


@triton.jit
def _combine(largest, sums, weighted):
    """Sums of tiles -> M, S, W. Tiles far below the maximum, or empty, weigh nothing."""
    top = tl.max(largest, axis=0)
    base = tl.where(top > -INFINITY, top, 0.0)
    distance = tl.maximum(largest - base, FLOOR)
    factor = tl.where(largest > -INFINITY, tl.exp(largest - base), 0.0)
    total = tl.sum(factor * sums, axis=0)
    return top, total, tl.sum(factor * (weighted + distance * sums), axis=0), factor


@triton.jit
def _target_tile(
    floats_ptr,  # of this tile: [TOP_K + 2] float32 at steps of num_tiles, written
    ints_ptr,  # of this tile: [3] int32 at steps of num_tiles, written
    logits,  # [TILE_SIZE] float32
    offsets,  # [TILE_SIZE] int32, the tokens
    token,  # d
    threshold,  # z_d
    vocab_size,
    num_tiles,
    TOP_K: tl.constexpr,
):
    """Partial statistics of one tile of a target row."""
    isnan = logits != logits
    tl.store(ints_ptr + TILE_NAN * num_tiles, tl.min(tl.where(isnan, offsets, vocab_size), axis=0))
    logits = tl.where(isnan, -INFINITY, logits)
    before = (logits > threshold) | ((logits == threshold) & (offsets < token))
    tl.store(ints_ptr + TILE_RANK * num_tiles, tl.sum(before.to(tl.int32), axis=0))
    value, total, weighted, _ = _sums(logits)
    tl.store(floats_ptr + (TOP_K + SUM) * num_tiles, total)
    tl.store(floats_ptr + (TOP_K + WEIGHTED) * num_tiles, weighted)
    first = tl.min(offsets, axis=0)
    for k in tl.static_range(TOP_K):
        value, index = tl.max(logits, axis=0, return_indices=True)
        tl.store(floats_ptr + k * num_tiles, value)
        if k == 0:
            tl.store(ints_ptr + TILE_ARGMAX * num_tiles, first + index)
        logits = tl.where(offsets == first + index, -INFINITY, logits)


@triton.jit(
    do_not_specialize=["num_rows", "vocab_size", "num_blocks", "num_tiles"],
    do_not_specialize_on_alignment=["draft_sampled_ptr", "slot_ptr", "local_pos_ptr"],
)
def target_statistics_kernel(
    target_max_ptr,  # [num_rows, num_blocks] float32, written for sampled rows
    target_sumexp_ptr,  # [num_rows, num_blocks] float32, written for sampled rows
    draft_max_ptr,  # [num_rows, num_blocks] float32, written for sampled rows
    draft_sumexp_ptr,  # [num_rows, num_blocks] float32, written for sampled rows
    greedy_max_ptr,  # [num_rows, num_tiles] float32, written for greedy rows when SEPARATE
    greedy_argmax_ptr,  # [num_rows, num_tiles] int32, written for greedy rows when SEPARATE
    floats_ptr,  # [num_rows, TOP_K + 2, num_tiles] float32, written for arbitrated rows; unless SEPARATE for greedy too
    ints_ptr,  # [num_rows, 3, num_tiles] int32, likewise
    raw_ptr,  # [num_rows, V]
    raw_stride,
    processed_ptr,  # [num_rows, V]; the same memory as raw unless SEPARATE
    processed_stride,
    draft_ptr,  # [slots, K, V] raw draft logits
    draft_stride_0,
    draft_stride_1,
    draft_sampled_ptr,  # [num_rows] the token at each row; the draft of a row is the next row's
    slot_ptr,  # [num_rows]
    local_pos_ptr,  # [num_rows] index of the row in its request
    temperature_ptr,  # [slots] float32
    arbitrated_ptr,  # [slots] int32
    num_rows,
    vocab_size,
    num_blocks,
    num_tiles,
    BLOCK_SIZE: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_DRAFT_LOGITS: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if _is_bonus(local_pos_ptr, row, num_rows):
        return
    block = tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    greedy = temperature == 0.0
    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    raw_ptr += row * raw_stride
    processed_ptr += row * processed_stride
    # Tiles keep the many statistics of a row in registers. They come before the sums, which then have the registers to
    # themselves: behind the sums, pointers that wait for the tiles are spilled.
    token = tl.load(draft_sampled_ptr + row + 1).to(tl.int32)
    drafted = (token >= 0) & (token < vocab_size)
    threshold = tl.load(raw_ptr + token, mask=drafted, other=INFINITY).to(tl.float32)
    first_tile = block * (BLOCK_SIZE // TILE_SIZE)
    last_tile = tl.minimum(first_tile + BLOCK_SIZE // TILE_SIZE, num_tiles)
    for tile in range(first_tile, last_tile):
        span = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
        if SEPARATE and greedy:
            choices = tl.load(processed_ptr + span, mask=span < vocab_size, other=-INFINITY).to(tl.float32)
            best, index = tl.max(choices, axis=0, return_indices=True)
            tl.store(greedy_max_ptr + row * num_tiles + tile, best)
            tl.store(greedy_argmax_ptr + row * num_tiles + tile, tile * TILE_SIZE + index)
        if arbitrated or (greedy and not SEPARATE):
            values = tl.load(raw_ptr + span, mask=span < vocab_size, other=-INFINITY).to(tl.float32)
            _target_tile(
                floats_ptr + row * (TOP_K + 2) * num_tiles + tile,
                ints_ptr + row * TILE_INTS * num_tiles + tile,
                values, span, token, threshold, vocab_size, num_tiles, TOP_K,
            )  # fmt: skip

    if not greedy:  # the tiles have just read the same logits, so these loads find them in the cache
        offsets = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < vocab_size
        place = row * num_blocks + block
        logits = tl.load(processed_ptr + offsets, mask=mask, other=-INFINITY).to(tl.float32)
        largest, total = _compute_max_and_sumexp(logits)
        tl.store(target_max_ptr + place, largest)
        tl.store(target_sumexp_ptr + place, total)
        if HAS_DRAFT_LOGITS:
            draft_ptr += slot * draft_stride_0 + tl.load(local_pos_ptr + row) * draft_stride_1
            draft = tl.load(draft_ptr + offsets, mask=mask, other=-INFINITY).to(tl.float32) / temperature
            largest, total = _compute_max_and_sumexp(draft)
            tl.store(draft_max_ptr + place, largest)
            tl.store(draft_sumexp_ptr + place, total)


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
    temperature_ptr,  # [slots] float32
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
    if _is_bonus(local_pos_ptr, row, num_rows):
        return
    slot = tl.load(slot_ptr + row).to(tl.int64)
    step = tl.load(local_pos_ptr + row)
    position = tl.load(pos_ptr + row)
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    drafted = tl.load(draft_sampled_ptr + row + 1).to(tl.int64)
    token = tl.maximum(drafted, 0)
    row_ints_ptr += row * ROW_INTS
    row_floats_ptr += row * ROW_FLOATS

    greedy = temperature == 0.0
    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    tiles = tl.arange(0, PADDED_TILES)
    inside = tiles < num_tiles
    floats_ptr += row * (TOP_K + 2) * num_tiles
    ints_ptr += row * TILE_INTS * num_tiles
    largest = tl.load(floats_ptr + tiles, mask=inside & arbitrated, other=-INFINITY)

    # The verdict of strict verification, as stock's rejection kernel reaches it.
    if greedy:
        if SEPARATE:
            argmax = _compute_global_target_argmax(
                greedy_max_ptr, num_tiles, greedy_argmax_ptr, num_tiles, row, num_tiles, PADDED_TILES
            )
        else:
            argmax = _compute_global_target_argmax(
                floats_ptr, 0, ints_ptr + TILE_ARGMAX * num_tiles, 0, row, num_tiles, PADDED_TILES
            )
        tl.store(row_ints_ptr + ACCEPTED, ((argmax == token) & (drafted >= 0)).to(tl.int32))
        tl.store(row_ints_ptr + STRICT_TOKEN, argmax.to(tl.int32))
        tl.store(row_floats_ptr + RATIO, 0.0)
        tl.store(row_floats_ptr + UNIFORM, 1.0)
        tl.store(row_floats_ptr + TARGET_LSE, 0.0)
        tl.store(row_floats_ptr + DRAFT_LSE, 0.0)
    else:
        uniform = tl_rand32(tl.load(seed_ptr + slot), position, includes_zero=False)
        target_logprob, draft_logprob, target_lse, draft_lse = _compute_global_logprobs_and_logsumexp(
            token, True, row, slot, step, temperature,
            processed_ptr, processed_stride, target_max_ptr, num_blocks, target_sumexp_ptr, num_blocks,
            draft_ptr, draft_stride_0, draft_stride_1, draft_max_ptr, num_blocks, draft_sumexp_ptr, num_blocks,
            num_blocks, PADDED_BLOCKS, HAS_DRAFT_LOGITS,
        )  # fmt: skip
        accepted = (target_logprob > tl.log(uniform) + draft_logprob) & (drafted >= 0)
        tl.store(row_ints_ptr + ACCEPTED, accepted.to(tl.int32))
        tl.store(row_ints_ptr + STRICT_TOKEN, token.to(tl.int32))
        ratio = tl.where(draft_logprob > -INFINITY, tl.exp(target_logprob - draft_logprob), 0.0)
        tl.store(row_floats_ptr + RATIO, ratio)
        tl.store(row_floats_ptr + UNIFORM, uniform)
        tl.store(row_floats_ptr + TARGET_LSE, target_lse)
        tl.store(row_floats_ptr + DRAFT_LSE, draft_lse)

    if not arbitrated:
        tl.store(row_ints_ptr + STATUS, CLOSED)
        tl.store(row_ints_ptr + MATCH, 0)
        return

    sums = tl.load(floats_ptr + (TOP_K + SUM) * num_tiles + tiles, mask=inside, other=0.0)
    weighted = tl.load(floats_ptr + (TOP_K + WEIGHTED) * num_tiles + tiles, mask=inside, other=0.0)
    highest, total, moment, _ = _combine(largest, sums, weighted)
    first_nan = tl.min(tl.load(ints_ptr + TILE_NAN * num_tiles + tiles, mask=inside, other=vocab_size), axis=0)
    rank = tl.sum(tl.load(ints_ptr + TILE_RANK * num_tiles + tiles, mask=inside, other=0), axis=0)
    top = tl.load(ints_ptr + TILE_ARGMAX * num_tiles + tl.argmax(largest, axis=0))
    top = tl.where(first_nan < vocab_size, first_nan, top)  # torch.argmax takes a NaN for the maximum
    finite = (first_nan == vocab_size) & (tl.abs(highest) < INFINITY)

    lse = highest + tl.log(total)
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

    known = (drafted >= 0) & (drafted < vocab_size)
    logit_draft = tl.load(raw_ptr + row * raw_stride + token, mask=known, other=-INFINITY).to(tl.float32)
    legal = tl.load(processed_ptr + row * processed_stride + token, mask=known, other=-INFINITY).to(tl.float32)
    output_position = position + 1 - tl.load(response_start_ptr + slot)
    inexact = output_position >= tl.load(exact_tokens_ptr + slot)
    is_open = known & finite & (tl.abs(legal) < INFINITY) & inexact
    tl.store(row_ints_ptr + STATUS, tl.where(drafted < 0, NO_DRAFT, tl.where(is_open, OPEN, CLOSED)))
    tl.store(row_ints_ptr + MATCH, (top == drafted).to(tl.int32))
    tl.store(row_ints_ptr + TOP, top)
    tl.store(row_ints_ptr + RANK, rank)
    tl.store(row_floats_ptr + LOGPROB_DRAFT, tl.maximum(logit_draft - lse, FLOOR))
    tl.store(row_floats_ptr + LOGPROB_TOP, highest - lse)
    tl.store(row_floats_ptr + GAP, gap)
    tl.store(row_floats_ptr + ENTROPY, tl.log(total) - moment / total)
    tl.store(row_floats_ptr + TOP_K_ENTROPY, top_k_entropy)
    tl.store(row_floats_ptr + LOGIT_DRAFT, logit_draft)
    tl.store(row_floats_ptr + LOGIT_TOP, highest)
    tl.store(row_floats_ptr + RAW_LSE, lse)


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
    value, total, weighted, weight = _sums(draft)
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
    highest, total, moment, factor = _combine(largest, sums, weighted)
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
