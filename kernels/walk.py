"""The walk through the blocks of a step, compiled by numba: see :mod:`vllm_cospec.kernels.loops`."""

from __future__ import annotations

import math

import numpy as np

from vllm_cospec.kernels.loops import compiled
from vllm_cospec.kernels.regret import REGRET_UNIT


@compiled("boolean(int64[::1], int64, int64[::1])")
def undeliverable(before, output_position, ends):
    """As :func:`vllm_cospec.kernels.reach.undeliverable` of one token, with the block's drafts ``before`` it."""
    if output_position >= ends[0]:
        return True
    for i in range(before.size):
        for stop in range(1, ends.size):
            if before[i] == ends[stop]:
                return True
    return False


@compiled(
    "int64(int64[::1], int64[::1], boolean[::1], int64[::1], boolean[::1], int64[:, ::1], "
    "float32[::1], int64, int64[::1], int64, "
    "boolean[::1], int64[::1], int64[::1], int64[::1], int64[::1], float64[::1], float64[::1], int64, "
    "int64[::1], int64[::1], float64[::1], int64[::1], boolean[::1], "
    "int64[:, ::1], float64[::1], float32[:, ::1], float32[:, ::1])"
)
def advance(
    first,  # [B + 1], first draft of each request
    drafts,  # [N]
    accepted,  # [N], strict verification's verdicts
    best,  # [N], t*
    legal,  # [N]
    ends,  # [B, 1 + STOPS], or [B, 1]: what ends each response
    logits,  # [*] rows of raw target logits
    stride,
    logit_row,  # [N]
    vocabulary,
    arbitrated,  # [B]
    output_position,  # [B], and so on: see vllm_cospec.kernels.cpu.Requests
    overrides_so_far,
    max_overrides,
    exact_tokens,
    regret_so_far,
    max_regret,
    num_steps,  # K
    position,  # [B], how far each block is decided; advanced
    overrides,  # [B], in this block
    spent,  # [B], nats of those
    mismatches,  # [B], added to
    waiting,  # [B], which requests are to go on; cleared
    found,  # [5, B] written: request, position, drafts accepted next, d, t*
    given_up,  # [B] written: nats that keeping the draft gives up
    pair,  # [2, B] written: logits of d and t*
    statistics,  # [B, 16] written: the six columns that do not come from logits
):
    """Take every waiting request to its next mismatch that the policy may decide; returns how many there are."""
    count = 0
    for request in range(position.size):
        if not waiting[request]:
            continue
        waiting[request] = False
        start, n = first[request], first[request + 1] - first[request]
        at = position[request]
        while at < n and accepted[start + at]:
            at += 1
        position[request] = at
        if at == n or not arbitrated[request]:
            continue
        draft = start + at
        token = drafts[draft]
        place = output_position[request] + at
        if token < 0 or undeliverable(drafts[start:draft], place, ends[request]):
            continue
        mismatches[request] += 1
        made = overrides_so_far[request] + overrides[request]
        if not legal[draft] or token >= vocabulary or made >= max_overrides[request] or place < exact_tokens[request]:
            continue
        row = logit_row[draft] * stride
        logit_draft, logit_top = logits[row + token], logits[row + best[draft]]
        cost = float(np.float32(logit_top - logit_draft))
        cost = math.ceil(cost / REGRET_UNIT) * REGRET_UNIT if math.isfinite(cost) else math.inf
        budget = max_regret[request]
        if budget != math.inf and not (budget > 0 and regret_so_far[request] + spent[request] + cost <= budget):
            continue
        lookahead, native = 0, 0
        while at + 1 + lookahead < n and best[draft + 1 + lookahead] == drafts[draft + 1 + lookahead]:
            lookahead += 1
        while at + 1 + native < n and accepted[draft + 1 + native]:
            native += 1
        before = 0
        for i in range(start, draft):
            before += best[i] == drafts[i]
        found[0, count], found[1, count], found[2, count] = request, at, native
        found[3, count], found[4, count] = token, best[draft]
        given_up[count] = cost
        pair[0, count], pair[1, count] = logit_draft, logit_top
        statistics[count, 10] = at / num_steps
        statistics[count, 11] = lookahead / num_steps
        statistics[count, 12] = before / num_steps
        statistics[count, 13] = overrides[request]
        statistics[count, 14] = math.log1p(made)
        statistics[count, 15] = math.log1p(place)
        count += 1
    return count


@compiled(
    "void(boolean[::1], int64[:, ::1], float64[::1], int64[::1], int64[::1], float64[::1], boolean[::1], int64[::1])"
)
def settle(keep, found, given_up, position, overrides, spent, waiting, per_position):
    """Let the requests go on whose drafts are kept, bool [M]; the rest as for :func:`advance`."""
    for m in range(keep.size):
        if keep[m]:
            request = found[0, m]
            per_position[position[request]] += 1
            position[request] += 1
            overrides[request] += 1
            spent[request] += given_up[m]
            waiting[request] = True


@compiled("void(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int32[:, ::1])")
def emit(first, drafts, target_tokens, bonus_tokens, position, output):
    """Write what each request emits, [B, width + 1]: accepted drafts, then the target's or the bonus token, then -1."""
    for request in range(position.size):
        start, kept = first[request], position[request]
        for i in range(output.shape[1]):
            output[request, i] = drafts[start + i] if i < kept else -1
        complete = kept == first[request + 1] - start
        output[request, kept] = bonus_tokens[request] if complete else target_tokens[start + kept]
