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
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import (
    _compute_max_and_sumexp,
)

from vllm_cospec.kernels.triton.layout import (
    INFINITY,
    SUM,
    TILE_ARGMAX,
    TILE_INTS,
    TILE_NAN,
    TILE_RANK,
    TILE_SUMS,
    WEIGHTED,
)
from vllm_cospec.kernels.triton.tiles import sums_of


@triton.jit
def is_bonus(local_pos_ptr, row, num_rows):
    """The last row of a request has no draft: the next row starts another request."""
    return tl.load(local_pos_ptr + row + 1, mask=row + 1 < num_rows, other=0) == 0


@triton.jit
def temperature_of(temperature_ptr, slot):
    """Whether a request is greedy, and its temperature; without temperatures the verdict is given, and all are."""
    if temperature_ptr is None:
        return True, 0.0
    else:
        temperature = tl.load(temperature_ptr + slot).to(tl.float32)
        return temperature == 0.0, temperature


@triton.jit
def _target_tile(
    floats_ptr,  # of this tile: [TOP_K + TILE_SUMS] float32 at steps of num_tiles, written
    ints_ptr,  # of this tile: [TILE_INTS] int32 at steps of num_tiles, written
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
    value, total, weighted, _ = sums_of(logits)
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
    floats_ptr,  # [num_rows, TOP_K + TILE_SUMS, num_tiles] float32, written for arbitrated and, unless SEPARATE, greedy
    ints_ptr,  # [num_rows, TILE_INTS, num_tiles] int32, likewise
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
    temperature_ptr,  # [slots] float32, or None where the verdict is given
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
    if is_bonus(local_pos_ptr, row, num_rows):
        return
    block = tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    greedy, temperature = temperature_of(temperature_ptr, slot)
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
                floats_ptr + row * (TOP_K + TILE_SUMS) * num_tiles + tile,
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
