"""The loops of the CPU path, compiled by numba, which vLLM brings: one thread, nothing allocated, no call per request.

Importing this module takes a second, and some more the first time on a machine: numba keeps what it has compiled. Every
function has its signature written out, but for the number of tensors that the rows of the draft lie in.

Rows of logits are slices of one vector, ``[row * stride : row * stride + vocabulary]``. Sums are taken in float32 over
``CHUNK`` terms at a time, and these in float64. A row with NaN, with +inf or without a finite logit makes its
exponentials NaN, so nothing here looks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite.binding import ffi
from numba import njit

from vllm_cospec.kernels.statistics import INPUT_LIMIT, LOGPROB_FLOOR

CHUNK = 4096
FLOOR, CEILING = np.float32(LOGPROB_FLOOR), -LOGPROB_FLOOR
UNDERFLOW = np.float32(-87.0)  # e to the power of less is no normal float32
ROUNDING = np.float32(1.5 * 2**23)  # what is added to it becomes whole, and its low bits are those of an integer
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # n * LN2_HIGH is exact
# Integers that are ordered as floats are: of -inf, and of what is larger than +inf.
MINUS_INF, INFINITY, LARGEST = np.int32(-2139095041), np.int32(0x7F800000), np.int32(0x7FFFFFFF)
LIMIT = np.float32(INPUT_LIMIT)

MENDED, ORIGINAL = "llvmlite.binding.ffi:_lib_wrapper.__getattr__", "__cospec_original__"
"""What :func:`_mend_llvmlite` replaces, which vllm_cospec/ledger.py lists, and where it keeps what stood there."""
REORDERED = {"reassoc", "nsz"}  # sums may be taken in any order, else they go through one register


def _mend_llvmlite() -> None:
    """Let the library of LLVM answer for its own functions alone: by now it has one for every name, ``__dict__`` too.

    vLLM's registry of kernels looks into whatever modules hold, and no engine starts in a process with numba.
    """
    wrapper = getattr(ffi, "_lib_wrapper", None)
    if wrapper is None or "__getattr__" not in vars(wrapper) or hasattr(wrapper.__getattr__, ORIGINAL):
        return
    found = wrapper.__getattr__

    def find(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return found(self, name)

    setattr(find, ORIGINAL, found)
    wrapper.__getattr__ = find


_mend_llvmlite()


def compiled(signature: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for these types, or for those it is called with; kept on disk where that is possible."""

    def decorate(function: Callable[..., Any]) -> Any:
        arguments = () if signature is None else (signature,)
        try:
            return njit(*arguments, cache=True, **options)(function)
        except RuntimeError:  # neither the package's directory nor the user's cache can be written to
            return njit(*arguments, **options)(function)

    return decorate


# With its own signature: compiled on behalf of a caller it would inherit the caller's licence to reorder, and lose
# what adding and subtracting ROUNDING is for.
@compiled("float32(float32)")
def _exp(x):
    """e^x for x <= 0, to the last bit or so; what underflows is some 1e-38."""
    x = UNDERFLOW if x < UNDERFLOW else x
    shifted = np.float32(x * LOG2_E + ROUNDING)
    n = shifted - ROUNDING
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    return p * np.int32((shifted.view(np.int32) + 127) << 23).view(np.float32)


@compiled("float32(float32, float32, float32)")  # not reordered either: two large numbers would be added up first
def _logprob(logit, top, log_sum):
    logprob = np.float32(logit - top) - log_sum
    return FLOOR if logprob < FLOOR else logprob


@compiled("int32(int32)")
def _ordered(bits):
    """A float's bits as an integer that is ordered like the floats, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & LARGEST))


@compiled("int32(float32[::1])")
def _largest(row):
    """The largest of a row, as an integer ordered like the floats: so it takes a vector at a time."""
    bits = row.view(np.int32)
    largest = MINUS_INF
    for i in range(bits.size):
        largest = max(largest, _ordered(bits[i]))
    return largest


@compiled("float32(int32)")
def _as_float(ordered):
    """The float that :func:`_largest` has found."""
    return np.int32(_ordered(ordered)).view(np.float32)


@compiled("UniTuple(float32, 2)(float32[::1], float32)", fastmath=REORDERED)
def _chunk_sums(row, largest):
    total, moment = np.float32(0), np.float32(0)
    for i in range(row.size):
        shifted = row[i] - largest
        weight = _exp(shifted)
        total += weight
        moment += weight * (FLOOR if shifted < FLOOR else shifted)
    return total, moment


@compiled("float32(float32[::1], float32[::1], float32, float32, float32, float32)", fastmath=REORDERED)
def _chunk_divergence(draft, target, draft_top, draft_log, target_top, target_log):
    total = np.float32(0)
    for i in range(draft.size):
        logq = _logprob(draft[i], draft_top, draft_log)
        total += _exp(logq) * (logq - _logprob(target[i], target_top, target_log))
    return total


@compiled("int64(float32[::1], int64)")
def _rank(row, token):
    """Tokens that stand before one when logits are sorted downwards, the lower index first in a tie."""
    value, rank = row[token], 0
    for i in range(row.size):
        rank += row[i] > value
    before = row[:token]
    for i in range(before.size):
        rank += before[i] == value
    return rank


@compiled("UniTuple(float64, 2)(float32[::1], float32)")
def _log_sum(row, largest):
    """Log of the sum of exp(z - max z), and the entropy."""
    total, moment = 0.0, 0.0
    for start in range(0, row.size, CHUNK):
        some, weighted = _chunk_sums(row[start : start + CHUNK], largest)
        total += some
        moment += weighted
    log = math.log(total) if total > 0 else math.nan
    return log, log - moment / total


@compiled("float64(float32[::1], float32[::1], float32, float32, float32, float32)")
def _divergence(draft, target, draft_top, draft_log, target_top, target_log):
    """KL(q || p); 0 to the last bit where the rows are the same."""
    total = 0.0
    for start in range(0, draft.size, CHUNK):
        total += _chunk_divergence(
            draft[start : start + CHUNK], target[start : start + CHUNK], draft_top, draft_log, target_top, target_log
        )
    return min(max(total, 0.0), CEILING) if total == total else total


@compiled("float64(float64)")
def _floored(logprob):
    return LOGPROB_FLOOR if logprob < LOGPROB_FLOOR else logprob


@compiled("float64(float64, float64)")
def _gap(log_sum, second):
    """Distance of the first choice from the second, which lies so far below: ``second`` is z - max z."""
    return min(-log_sum - _floored(second - log_sum), CEILING)


@compiled("float32(float32[::1], int64)")
def _second(row, top):
    """The largest beside the one at ``top``."""
    return _as_float(max(_largest(row[:top]), _largest(row[top + 1 :])))


@compiled("int64(float32[::1])")
def _argmax(row):
    """Where the largest is, the first of equals; NaN is larger than anything."""
    found, start = MINUS_INF, 0
    for chunk in range(0, row.size, CHUNK):
        bits = row[chunk : chunk + CHUNK].view(np.int32)
        largest = MINUS_INF
        for i in range(bits.size):
            largest = max(largest, LARGEST if (bits[i] & LARGEST) > INFINITY else _ordered(bits[i]))
        if largest > found:
            found, start = largest, chunk
    for i in range(start, row.size):
        value = row[i]
        if value != value if found == LARGEST else value == _as_float(found):
            return i
    return 0


@compiled(
    "void(int32[::1], int32[::1], float32[::1], int64, int64, "
    "int64[::1], int64[::1], int64[::1], boolean[::1], boolean[::1])"
)
def greedy_verdicts(draft_tokens, rows, logits, stride, vocabulary, drafts, logit_row, best, accepted, legal):
    """What strict verification says of N drafts of greedy requests, each by itself; all but the first line are written.

    The rows of ``logits`` that the drafts are verified with are ``rows`` [N].
    """
    for i in range(drafts.size):
        drafts[i], logit_row[i] = draft_tokens[i], rows[i]
        row = logits[logit_row[i] * stride : logit_row[i] * stride + vocabulary]
        best[i] = _argmax(row)
        accepted[i] = best[i] == drafts[i]
        legal[i] = 0 <= drafts[i] < vocabulary and math.isfinite(row[min(max(drafts[i], 0), vocabulary - 1)])


@compiled("void(float32[:, ::1], float32[::1], int64[::1], float32[::1])")
def scores(statistics, weights, sizes, out):
    """What an arbiter says of M mismatches: mean, scale, then of each layer weights [in, out] and bias, end to end."""
    widest, columns = sizes.max(), statistics.shape[1]
    inputs, outputs = np.empty(widest, np.float32), np.empty(widest, np.float32)
    for m in range(out.size):
        for i in range(columns):
            value = (statistics[m, i] - weights[i]) / weights[columns + i]
            inputs[i] = -LIMIT if value < -LIMIT else LIMIT if value > LIMIT else value
        at = 2 * columns
        for layer in range(sizes.size - 1):
            size = sizes[layer + 1]
            bias = weights[at + sizes[layer] * size : at + (sizes[layer] + 1) * size]
            sums = outputs[:size]
            for j in range(sums.size):
                sums[j] = bias[j]
            for i in range(sizes[layer]):
                value, row = inputs[i], weights[at + i * size : at + (i + 1) * size]
                for j in range(sums.size):
                    sums[j] += value * row[j]
            at += (sizes[layer] + 1) * size
            for j in range(size):
                inputs[j] = np.float32(0) if outputs[j] < 0 else outputs[j]
        out[m] = 1 / (1 + math.exp(-outputs[0]))


@compiled()
def logit_statistics(
    out,  # [M, 16] float32, the first ten columns written
    sound,  # [M] bool, written: whether none of them is NaN
    target,  # [*] float32, rows of raw logits
    target_stride,
    target_row,  # [M] int64
    drafts,  # tuple of [*] float32, rows of the draft's
    draft_strides,  # [len(drafts)] int64; of length 0 for a drafter without logits
    draft_part,  # [M] int64, which of them a row lies in
    draft_row,  # [M] int64
    token,  # [M] int64, d
    top,  # [M] int64, t*
    vocabulary,
):
    """The ten statistics that come from logits, in the order of the schema."""
    for m in range(out.shape[0]):
        start = target_row[m] * target_stride
        row = target[start : start + vocabulary]
        first = row[top[m]]
        log_sum, entropy = _log_sum(row, first)
        out[m, 0] = _floored(float(row[token[m]]) - float(first) - log_sum)
        out[m, 1] = -log_sum
        out[m, 2] = _gap(log_sum, float(_second(row, top[m])) - float(first))
        out[m, 3] = entropy
        out[m, 4] = math.log1p(_rank(row, token[m]))
        out[m, 5:10] = 0
        if draft_strides.size > 0:
            start = draft_row[m] * draft_strides[draft_part[m]]
            own = drafts[draft_part[m]][start : start + vocabulary]
            own_top = _argmax(own)
            own_first = own[own_top]
            own_log_sum, own_entropy = _log_sum(own, own_first)
            out[m, 5] = _floored(float(own[token[m]]) - float(own_first) - own_log_sum)
            out[m, 6] = _floored(float(own[top[m]]) - float(own_first) - own_log_sum)
            out[m, 7] = _gap(own_log_sum, float(_second(own, own_top)) - float(own_first))
            out[m, 8] = own_entropy
            out[m, 9] = _divergence(own, row, own_first, np.float32(own_log_sum), first, np.float32(log_sum))
        sound[m] = True
        for i in range(10):
            sound[m] = sound[m] and not math.isnan(out[m, i])
