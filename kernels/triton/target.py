"""Fused verification of draft tokens on a GPU: strict verdicts, statistics, policy and scan, in Triton.

For a row of target logits z over V tokens and a draft token d, one pass over blocks of the vocabulary keeps per block b

    m_b = max z,  the argmax,  s_b = sum exp(z - m_b),

and from these follow, with M = max m_b and S = sum s_b exp(m_b - M),

    log p(d) = z_d - M - log S,     log p(t*) = -log S,     and whether the row has a distribution: 0 < S < inf.

What else a policy may ask is asked of rejected rows alone, which are read once more, beside the draft's row y:

    entropy = -sum p log p,  the rank of d,  the second choice;   m_b = max y,  the second,  s_b = sum exp(y - m_b),
    w_b = sum exp(y - m_b) (y - m_b),  c_b = sum exp(y - m_b) max(log p, floor),

so that KL(q || p) = W / S - log S - C / S, with S, W and C of the draft put together from its blocks. A rule that
reads one of entropy, rank and top-k entropy, and nothing of the draft, gets it in the first pass instead: there it
costs instructions while the memory is the limit, a second read would cost memory. Nothing of the size of the logits is
ever written.

The stages, one launch each, and what each reads of the logits:

1. ``target_statistics_kernel``, a program per (row, block): every target row once; the rows of sampled requests also
   as strict verification needs them, with the draft's row at the request's temperature.
2. ``verdict_kernel``, a program per row: combines the blocks, decides as strict verification does.
3. ``mismatch_kernel``, a program per (request, block): target and draft row of every rejected position that the policy
   may come to. Launched when the policy reads more than stages 1 and 2 know. For the few rules that ask for something
   of both distributions together ``joint_kernel`` reads them once more, now that both are known.
4. ``scan_kernel``, a program per request: walks the block, consults the policy, emits.
5. vLLM's own resampling kernels draw the one token of each request that is not a draft.

The strict verdict comes from vLLM's device functions, with its block sizes and its stateless random numbers, so strict
requests get what stock verification gives them. Every result depends on the request's own rows alone. The vocabulary
and the strides of rows are constant in a server and may be specialised on; integers that vary from step to step are
run-time arguments that nothing is specialised on; choices are ``constexpr``.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import _compute_max_and_sumexp

from vllm_cospec.kernels.triton.layout import (
    BLOCK_FIELDS,
    ENTROPY,
    EXTRA,
    FLOOR,
    INFINITY,
    NOTHING,
    PROCESSED_ARGMAX,
    PROCESSED_MAX,
    PROCESSED_SUM,
    RANK,
    RAW_ARGMAX,
    RAW_MAX,
    RAW_SUM,
    SCALED_DRAFT_MAX,
    SCALED_DRAFT_SUM,
    TOP_K,
)
from vllm_cospec.kernels.triton.tiles import aligned, base_of, exp, load_logits


@triton.jit
def is_bonus(step_ptr, row, num_rows):
    """The last row of a request has no draft: the next row starts another request."""
    return tl.load(step_ptr + row + 1, mask=row + 1 < num_rows, other=0) == 0


@triton.jit
def place_of(request, request_slot_ptr, first_ptr):
    """A request's slot, first row and number of drafts."""
    start = tl.load(first_ptr + request).to(tl.int64)
    num_drafts = tl.load(first_ptr + request + 1).to(tl.int64) - start - 1
    return tl.load(request_slot_ptr + request).to(tl.int64), start, num_drafts.to(tl.int32)


@triton.jit
def temperature_of(temperature_ptr, slot):
    """Whether a request is greedy, and its temperature; without temperatures the verdict is given, and all are."""
    if temperature_ptr is None:
        return True, 0.0
    else:
        temperature = tl.load(temperature_ptr + slot).to(tl.float32)
        return temperature == 0.0, temperature


@triton.jit
def _largest(
    row_ptr,  # [V]
    start,  # first token of the block
    vocab_size,
    width,
    BLOCK_SIZE: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Maximum of a block and its place, the first of equals; some place within the block where all is NaN."""
    lanes = tl.arange(0, TILE_SIZE)
    largest = tl.full((TILE_SIZE,), -INFINITY, tl.float32)
    tiles = tl.zeros((TILE_SIZE,), tl.int32)
    for tile in tl.static_range(0, BLOCK_SIZE, TILE_SIZE):
        logits = load_logits(row_ptr, start + tile + lanes, vocab_size, width, PADDED)
        tiles = tl.where(logits > largest, tile, tiles)
        largest = tl.maximum(largest, logits)
    best = tl.max(largest, axis=0)
    return best, start + tl.min(tl.where(largest == best, tiles + lanes, BLOCK_SIZE - 1), axis=0)


@triton.jit
def _sum_of_exponentials(
    row_ptr,  # [V]
    largest,  # maximum of the block
    start,
    vocab_size,
    width,
    BLOCK_SIZE: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """sum exp(z - max z) of a block that has just been read: these loads find it in the cache. NaN makes it NaN."""
    lanes = tl.arange(0, TILE_SIZE)
    total = tl.zeros((TILE_SIZE,), tl.float32)
    for tile in range(0, BLOCK_SIZE, TILE_SIZE):
        total += exp(load_logits(row_ptr, start + tile + lanes, vocab_size, width, PADDED) - base_of(largest))
    return tl.sum(total, axis=0)


@triton.jit
def _store_extra(
    extra_ptr,  # of this block: [1 or K] float32 at steps of num_blocks, written
    row_ptr,  # [V]
    largest,  # maximum of the block
    token,  # d
    threshold,  # z_d
    start,
    vocab_size,
    width,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr,
):
    """The statistic that a rule reads, of a block that has just been read."""
    lanes = tl.arange(0, TILE_SIZE)
    moment = tl.zeros((TILE_SIZE,), tl.float32)
    rank = tl.zeros((TILE_SIZE,), tl.int32)
    first = tl.full((TILE_SIZE,), -INFINITY, tl.float32)
    second, third, fourth = first, first, first
    for tile in range(0, BLOCK_SIZE, TILE_SIZE):
        offsets = start + tile + lanes
        logits = load_logits(row_ptr, offsets, vocab_size, width, PADDED)
        if KIND == ENTROPY:
            shifted = logits - base_of(largest)
            moment += exp(shifted) * tl.maximum(shifted, FLOOR)  # below the floor a term is nil, and 0 x -inf is not
        if KIND == RANK:
            rank += ((logits > threshold) | ((logits == threshold) & (offsets < token))).to(tl.int32)
        if KIND == TOP_K:
            fourth = tl.maximum(fourth, tl.minimum(third, logits))
            third = tl.maximum(third, tl.minimum(second, logits))
            second = tl.maximum(second, tl.minimum(first, logits))
            first = tl.maximum(first, logits)
    if KIND == ENTROPY:
        tl.store(extra_ptr, tl.sum(moment, axis=0))
    if KIND == RANK:
        tl.store(extra_ptr, tl.sum(rank, axis=0).to(tl.float32))
    if KIND == TOP_K:
        for k in tl.static_range(K):
            best = tl.max(first, axis=0)
            tl.store(extra_ptr + k * num_blocks, best)
            taken = lanes == tl.min(tl.where(first == best, lanes, TILE_SIZE), axis=0)
            first = tl.where(taken, second, first)
            second = tl.where(taken, third, second)
            third = tl.where(taken, fourth, third)


@triton.jit(
    do_not_specialize=["num_rows", "num_blocks"],
    do_not_specialize_on_alignment=["drafted_ptr", "slot_ptr", "step_ptr"],
)
def target_statistics_kernel(
    blocks_ptr,  # [num_rows, BLOCK_FIELDS + K - 1, num_blocks] float32, written
    raw_ptr,  # [num_rows, V]
    raw_stride,
    raw_width,
    processed_ptr,  # [num_rows, V]; the same memory as raw unless SEPARATE
    processed_stride,
    processed_width,
    draft_ptr,  # [slots, K, V] raw draft logits
    draft_stride_0,
    draft_stride_1,
    draft_width,
    drafted_ptr,  # [num_rows] the token at each row; the draft of a row is the next row's
    slot_ptr,  # [num_rows]
    step_ptr,  # [num_rows] index of the row in its request
    temperature_ptr,  # [slots] float32, or None where the verdict is given
    arbitrated_ptr,  # [slots] int32
    num_rows,
    vocab_size,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    TILE_SIZE: tl.constexpr,  # few enough logits at a time that what is kept of them stays in registers
    UNIT: tl.constexpr,  # of which strides and widths are multiples
    PADDED: tl.constexpr,
    KIND: tl.constexpr,  # of the statistic that a rule reads
    K: tl.constexpr,
    HAS_DRAFT_LOGITS: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if is_bonus(step_ptr, row, num_rows):
        return
    block = tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    greedy, temperature = temperature_of(temperature_ptr, slot)
    arbitrated = tl.load(arbitrated_ptr + slot) != 0
    start = block * BLOCK_SIZE
    fields = blocks_ptr + row * (BLOCK_FIELDS + K - 1) * num_blocks + block
    raw_row_ptr = raw_ptr + row * aligned(raw_stride, UNIT)
    token = tl.load(drafted_ptr + row + 1).to(tl.int32)
    threshold = INFINITY
    if KIND == RANK:
        drafted = (token >= 0) & (token < vocab_size)
        threshold = tl.load(raw_row_ptr + token, mask=drafted, other=INFINITY).to(tl.float32)

    if arbitrated or (greedy and not SEPARATE):
        raw_width = aligned(raw_width, UNIT)
        largest, place = _largest(raw_row_ptr, start, vocab_size, raw_width, BLOCK_SIZE, TILE_SIZE, PADDED)
        tl.store(fields + RAW_MAX * num_blocks, largest)
        tl.store(fields + RAW_ARGMAX * num_blocks, place.to(tl.float32))
        if arbitrated:
            # Stock's sum, below, serves sampled rows too. In a block of nothing but -inf it misses a NaN.
            if SEPARATE or greedy or not largest > -INFINITY:
                total = _sum_of_exponentials(
                    raw_row_ptr, largest, start, vocab_size, raw_width, BLOCK_SIZE, TILE_SIZE, PADDED
                )
                tl.store(fields + RAW_SUM * num_blocks, total)
            if KIND != NOTHING:
                _store_extra(
                    fields + EXTRA * num_blocks, raw_row_ptr, largest, token, threshold, start, vocab_size, raw_width,
                    num_blocks, BLOCK_SIZE, TILE_SIZE, PADDED, KIND, K,
                )  # fmt: skip
    if greedy:
        if SEPARATE:
            largest, place = _largest(
                processed_ptr + row * aligned(processed_stride, UNIT), start, vocab_size,
                aligned(processed_width, UNIT), BLOCK_SIZE, TILE_SIZE, PADDED,
            )  # fmt: skip
            tl.store(fields + PROCESSED_MAX * num_blocks, largest)
            tl.store(fields + PROCESSED_ARGMAX * num_blocks, place.to(tl.float32))
    else:
        # Strides as stock takes them: the order of a sum, and so its last bit, follows from how its terms are loaded.
        offsets = start + tl.arange(0, BLOCK_SIZE)
        logits = load_logits(processed_ptr + row * processed_stride, offsets, vocab_size, processed_width, PADDED)
        largest, total = _compute_max_and_sumexp(logits)
        tl.store(fields + PROCESSED_MAX * num_blocks, largest)
        tl.store(fields + PROCESSED_SUM * num_blocks, total)
        if not SEPARATE:  # noqa: SIM102 - chosen at compile time, the next at run time
            if arbitrated and largest > -INFINITY:
                tl.store(fields + RAW_SUM * num_blocks, total)
        if HAS_DRAFT_LOGITS:
            draft_ptr += slot * draft_stride_0 + tl.load(step_ptr + row) * draft_stride_1
            draft = load_logits(draft_ptr, offsets, vocab_size, draft_width, PADDED) / temperature
            largest, total = _compute_max_and_sumexp(draft)
            tl.store(fields + SCALED_DRAFT_MAX * num_blocks, largest)
            tl.store(fields + SCALED_DRAFT_SUM * num_blocks, total)
