"""Reading logits, and sums of exponentials put together from the blocks of a row."""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.triton.layout import FLOOR, INFINITY

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_logits(
    row_ptr,  # [V]
    offsets,
    vocab_size,
    width,  # how many elements of the row may be read, at least vocab_size
    PADDED: tl.constexpr,  # whether that is more
):
    """Load logits as float32; -inf beyond the vocabulary.

    A vocabulary that is no multiple of 16 would make the mask cut vectors, and every load scalar. Where the row goes
    on for a few elements, they are read and thrown away instead.
    """
    logits = tl.load(row_ptr + offsets, mask=offsets < width, other=-INFINITY).to(tl.float32)
    if PADDED:
        logits = tl.where(offsets < vocab_size, logits, -INFINITY)
    return logits


@triton.jit
def aligned(number, UNIT: tl.constexpr):
    """The same number, known to the compiler as a multiple of ``UNIT``; Triton itself only tries multiples of 16."""
    return number // UNIT * UNIT


@triton.jit
def base_of(largest):
    """What is subtracted before exponentials are taken: the maximum, or 0 where there is none."""
    return tl.where(largest > -INFINITY, largest, 0.0)


@triton.jit
def exp(x):
    """The exponential; in base 2 it takes two instructions, and small results become 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def combine(
    largest,  # [N] maximum of each block; -inf or NaN: nothing there
    sums,  # [N] sum exp(z - max) of each block
):
    """Blocks -> M, S = sum exp(z - M), and the factor of each block's sums. NaN in a block makes S NaN."""
    top = tl.max(largest, axis=0)
    factor = tl.where(largest > -INFINITY, tl.exp(largest - base_of(top)), 0.0)
    return top, tl.sum(factor * sums, axis=0), factor


@triton.jit
def combine_moments(
    largest,  # [N] maximum of each block
    sums,  # [N] sum exp(z - max)
    moments,  # [N] sum exp(z - max) (z - max)
    top,  # M
    factor,  # [N] of each block's sums
):
    """Blocks -> sum exp(z - M) (z - M). Blocks far below the maximum, or empty, weigh nothing."""
    distance = tl.maximum(largest - base_of(top), FLOOR)
    return tl.sum(factor * (moments + distance * sums), axis=0)
