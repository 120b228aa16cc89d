"""Sums over a tile of logits, and their combination over a row: softmax in one pass, nothing written but a few numbers.

The mathematics stands in :mod:`vllm_cospec.kernels.triton.target`.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.triton.layout import FLOOR, INFINITY


@triton.jit
def sums_of(logits):
    """m, sum exp(z - m), sum exp(z - m) (z - m) of one tile, and exp(z - m); NaN counts as absent."""
    largest = tl.max(logits, axis=0)
    base = tl.where(largest > -INFINITY, largest, 0.0)
    shifted = logits - base
    weight = tl.exp(shifted)
    # below the floor a term is nil, and 0 x -inf is not
    return largest, tl.sum(weight, axis=0), tl.sum(weight * tl.maximum(shifted, FLOOR), axis=0), weight


@triton.jit
def combine(largest, sums, weighted):
    """Sums of tiles -> M, S, W. Tiles far below the maximum, or empty, weigh nothing."""
    top = tl.max(largest, axis=0)
    base = tl.where(top > -INFINITY, top, 0.0)
    distance = tl.maximum(largest - base, FLOOR)
    factor = tl.where(largest > -INFINITY, tl.exp(largest - base), 0.0)
    total = tl.sum(factor * sums, axis=0)
    return top, total, tl.sum(factor * (weighted + distance * sums), axis=0), factor
