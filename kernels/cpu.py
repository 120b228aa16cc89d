"""Arbitration on the CPU: full statistics only for the mismatches a decision is needed for.

There is no device to synchronise with here, so control flow runs in numpy over whole batches: strict verification's
verdict on every position is an input, and each round takes the first undecided mismatch of every request at once.
Typically one or two rounds end a step. Only the rows of those mismatches, [M, V], get a softmax; nothing of size
[N, V] is written. Decisions equal those of :mod:`vllm_cospec.kernels.reference`.

NaN: a statistic is NaN where a row of logits it comes from has a NaN or no finite logit. Such a mismatch is strict,
whatever the policy or a decision made beforehand says, and is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_cospec.kernels.policies import Mismatches
from vllm_cospec.kernels.regret import REGRET_UNIT
from vllm_cospec.kernels.statistics import LOGPROB_FLOOR, NUM_STATISTICS, TINY

CEILING = -LOGPROB_FLOOR
PLACEHOLDER = -1  # pads the output, as vLLM's own rejection sampler does
CACHED_FLOATS = 2**17  # a row's passes run several times faster while it is in the second-level cache

Decide = Callable[[Mismatches, np.ndarray], tuple[Tensor, Tensor | None]]
"""(mismatches, index of each one's request) -> (kept, bool [M]; probability of keeping, float32 [M], or None)."""


@dataclass
class Requests:
    """Per-request settings and state of a batch, each array with B entries."""

    arbitrated: np.ndarray  # bool; False: strict
    junk: np.ndarray  # bool; the drafter did not propose these tokens: strict
    output_position: np.ndarray  # int64, index in the response of the block's first token
    overrides_so_far: np.ndarray  # int64
    max_overrides: np.ndarray  # int64, vllm_cospec.kernels.UNLIMITED for none
    exact_tokens: np.ndarray  # int64
    threshold: np.ndarray  # float32, of the learned policy
    regret_so_far: np.ndarray  # float64, nats, see vllm_cospec.kernels.regret
    max_regret: np.ndarray  # float64, from vllm_cospec.kernels.regret.in_units
    forced_at: np.ndarray | None = None  # int64, index in the response decided beforehand, -1 for none; training
    forced_keep: np.ndarray | None = None  # bool, how; mismatches before it are kept


@dataclass
class Batch:
    """One step of B requests with N draft tokens in all; rows of one request are consecutive."""

    draft_tokens: Tensor  # [N] int
    num_draft_tokens: np.ndarray  # [B] int64
    accepted: Tensor  # [N] bool, strict verification's verdict on each position by itself
    target_tokens: Tensor  # [N] int, emitted where the draft is not kept
    bonus_tokens: Tensor  # [B] int
    raw_target_logits: Tensor  # [N, V], or more rows with ``logit_rows``
    processed_target_logits: Tensor  # likewise
    raw_argmax: Tensor  # [N] int, t*
    draft_logits: Callable[[np.ndarray, np.ndarray], Tensor] | None  # (request, position), each [M] -> [M, V]
    num_speculative_tokens: int  # K
    max_draft_tokens: int  # width of the output less one
    requests: Requests
    acceptance_ratio: Tensor | None = None  # [N] float32, None when every request is greedy
    uniform: Tensor | None = None  # [N] float32
    logit_rows: Tensor | None = None  # [N] int, the row of logits each draft is verified with; None: its own
    legal: Tensor | None = None  # [N] bool, whether a draft may be kept; None: where its processed logit is finite
    undeliverable: Tensor | None = None  # [N] bool, from vllm_cospec.kernels.reach: strict, and no mismatch


@dataclass
class Consulted:
    """The mismatches one round put to the policy."""

    request: np.ndarray  # [M] index into the batch
    position: np.ndarray  # [M] in the block
    output_position: np.ndarray  # [M]
    statistics: Tensor  # [M, 16] float32
    kept: np.ndarray  # [M] bool
    probability: Tensor | None  # [M] float32, of keeping

    def only(self, mask: np.ndarray) -> Consulted:
        """Return the entries where ``mask``, bool [M], is True."""
        probability = None if self.probability is None else self.probability[mask]
        return Consulted(
            self.request[mask],
            self.position[mask],
            self.output_position[mask],
            self.statistics[mask],
            self.kept[mask],
            probability,
        )


@dataclass
class BatchResult:
    """What verification makes of a batch."""

    output: Tensor  # [B, max_draft_tokens + 1] int32, PLACEHOLDER where nothing is emitted
    mismatches: np.ndarray  # [B] int64
    """Drafts of arbitrated requests that can be delivered, whether the policy could be consulted or not."""
    overrides: np.ndarray  # [B] int64
    regret: np.ndarray  # [B] float64, nats, of the overrides
    overrides_per_position: np.ndarray  # [max_draft_tokens] int64
    consulted: list[Consulted] = field(default_factory=list)

    @property
    def num_mismatches(self) -> int:
        """Of all requests together."""
        return int(self.mismatches.sum())


def logit_statistics(target: Tensor, draft: Tensor | None, token: Tensor, top: Tensor) -> Tensor:
    """Return the ten statistics that come from logits, float32 [M, 10], in schema order.

    Args:
        target: raw target logits of M mismatches, float32 [M, V].
        draft: raw draft logits, float32 [M, V], or None.
        token: d, int64 [M].
        top: t*, int64 [M].
    """
    out = target.new_zeros(len(target), 10)
    chunk = max(1, CACHED_FLOATS // target.shape[1])
    for first in range(0, len(target), chunk):
        rows = slice(first, first + chunk)
        _chunk_statistics(
            out[rows], target[rows], None if draft is None else draft[rows], token[rows, None], top[rows, None]
        )
    return out


def argmax(logits: Tensor) -> Tensor:
    """Return the index of each row's maximum, int64 [N], as ``logits.argmax(-1)`` does: NaN counts as the largest.

    numpy's is many times faster than torch's on a CPU.
    """
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _chunk_statistics(out: Tensor, target: Tensor, draft: Tensor | None, token: Tensor, top: Tensor) -> None:
    """Fill in :func:`logit_statistics` for a few rows, few enough to stay in the cache; token and top are [M, 1]."""
    logp = torch.log_softmax(target, dim=-1).clamp_(min=LOGPROB_FLOOR)
    out[:, 0:1] = logp.gather(1, token)
    out[:, 1:2] = logp.gather(1, top)
    out[:, 3] = -torch.linalg.vecdot(logp.exp(), logp)
    out[:, 4] = _rank(target, token).float().log1p()
    if draft is not None:
        logq = torch.log_softmax(draft, dim=-1).clamp_(min=LOGPROB_FLOOR)
        q = logq.exp()
        out[:, 5:6] = logq.gather(1, token)
        out[:, 6:7] = logq.gather(1, top)
        out[:, 8] = -torch.linalg.vecdot(q, logq)
        out[:, 9] = (-out[:, 8] - torch.linalg.vecdot(q, logp)).clamp(0, CEILING)
        out[:, 7] = _top2_gap(logq, argmax(logq).unsqueeze(1))
    out[:, 2] = _top2_gap(logp, top)


def top_k_entropy(target: Tensor, k: int) -> Tensor:
    """Return -sum of p log p over the k most likely tokens of each row, float32 [M]."""
    logp = torch.log_softmax(target, dim=-1).topk(min(k, target.shape[1]), dim=-1).values.clamp(min=LOGPROB_FLOOR)
    return -(logp.exp() * logp).sum(1)


def divergence(target: Tensor, draft: Tensor, kind: str) -> Tensor:
    """Return the Jensen-Shannon divergence ("js", nats) or total variation ("tv") of each pair of rows, float32 [M]."""
    logp, logq = (torch.log_softmax(rows, dim=-1).clamp(min=LOGPROB_FLOOR) for rows in (target, draft))
    p, q = logp.exp(), logq.exp()
    if kind == "tv":
        return (p - q).abs().sum(1) / 2
    logm = ((p + q) / 2).clamp(min=TINY).log()
    return (torch.linalg.vecdot(p, logp - logm) + torch.linalg.vecdot(q, logq - logm)) / 2


def mixture_lead(target: Tensor, draft: Tensor, token: Tensor, weight: float) -> Tensor:
    """Return by how much each ``token`` [M] leads all others in weight p + (1 - weight) q, float32 [M]."""
    mixed = weight * target.softmax(-1) + (1 - weight) * draft.softmax(-1)
    own = mixed.gather(1, token.unsqueeze(1)).squeeze(1)
    return own - mixed.scatter_(1, token.unsqueeze(1), -1.0).amax(1)


def _present(draft: Tensor | None) -> Tensor:
    """The draft's rows; policies that read them are refused where the drafter has none."""
    assert draft is not None
    return draft


def verify_batch(batch: Batch, decide: Decide, collect: bool = False) -> BatchResult:
    """Verify one step of a batch.

    Args:
        batch: the step; its tensors are only read.
        decide: the policy.
        collect: keep every consulted mismatch in the result.
    """
    n, width, requests = batch.num_draft_tokens, batch.max_draft_tokens, batch.requests
    columns = np.arange(width)
    valid = columns < n[:, None]
    rows = np.where(valid, (np.cumsum(n) - n)[:, None] + columns, 0)
    kept = batch.accepted.numpy()[rows] | ~valid if len(batch.draft_tokens) else ~valid
    native_run = _runs(kept & valid)
    matches = (batch.raw_argmax == batch.draft_tokens).numpy()
    matches = matches[rows] & valid if len(matches) else valid
    match_run = _runs(matches)
    matches_before = np.cumsum(matches, axis=1) - matches
    overrides, spent = np.zeros(len(n), np.int64), np.zeros(len(n), np.float64)
    found = np.zeros(len(n), np.int64)
    result = BatchResult(batch.draft_tokens, found, overrides, spent, np.zeros(width, np.int64))
    undecided = requests.arbitrated & ~requests.junk
    counts = (batch.draft_tokens >= 0).numpy()
    if batch.undeliverable is not None:
        counts &= ~batch.undeliverable.numpy()
    while True:
        position = np.where(kept, width, columns).min(axis=1, initial=width)
        request = np.flatnonzero(undecided & (position < width))
        request = request[counts[rows[request, position[request]]]]
        if not len(request):
            break
        found[request] += 1
        undecided[:] = False
        given_up = _regret(batch, rows[request, position[request]])
        allowed = _may_override(batch, request, position[request], rows, overrides)
        allowed &= _affordable(requests, request, spent, given_up)
        request, given_up = request[allowed], given_up[allowed]
        if not len(request):
            break
        at = position[request]
        context = np.stack(
            [
                at / batch.num_speculative_tokens,
                match_run[request, at + 1] / batch.num_speculative_tokens,
                matches_before[request, at] / batch.num_speculative_tokens,
                overrides[request],
                np.log1p(requests.overrides_so_far[request] + overrides[request]),
                np.log1p(requests.output_position[request] + at),
            ],
            axis=1,
        )
        mismatches = _gather(batch, request, at, rows[request, at], context, native_run[request, at + 1])
        keep, probability = decide(mismatches, request)
        # NaN anywhere in a row: strict, and nothing to learn from
        sound = ~mismatches.statistics.isnan().any(1).numpy()
        keep_rows = keep.numpy() & sound
        where = requests.output_position[request] + at
        if requests.forced_at is not None and requests.forced_keep is not None:
            decided = where <= requests.forced_at[request]
            earlier = where < requests.forced_at[request]
            keep_rows = np.where(decided, earlier | requests.forced_keep[request], keep_rows) & sound
        if collect:
            everything = Consulted(request, at, where, mismatches.statistics, keep_rows, probability)
            result.consulted.append(everything.only(sound))
        winners, at = request[keep_rows], at[keep_rows]
        kept[winners, at] = True
        overrides[winners] += 1
        spent[winners] += given_up[keep_rows]
        np.add.at(result.overrides_per_position, at, 1)
        undecided[winners] = True
    result.output = _emit(batch, np.minimum(np.where(kept, width, columns).min(axis=1, initial=width), n), rows)
    return result


def _top2_gap(logp: Tensor, top: Tensor) -> Tensor:
    """Distance of the maximum, at ``top`` [M, 1], from the next; overwrites the maximum."""
    first = logp.gather(1, top).squeeze(1)
    logp.scatter_(1, top, -np.inf)
    return (first - logp.amax(dim=1).clamp(min=LOGPROB_FLOOR)).clamp(max=CEILING)


def _rank(logits: Tensor, index: Tensor) -> Tensor:
    """Tokens that stand before ``index`` [M, 1] when logits are sorted downwards, lower index first in a tie."""
    rows, values = logits.numpy(), logits.gather(1, index).numpy()
    rank = np.count_nonzero(rows > values, axis=1)
    for i in np.flatnonzero(np.count_nonzero(rows == values, axis=1) > 1):
        rank[i] += np.count_nonzero(rows[i, : index[i, 0]] == values[i])
    return torch.from_numpy(rank)


def _runs(flags: np.ndarray) -> np.ndarray:
    """Length of the run of True that starts at each column, with one extra column of zeros: [B, K] -> [B, K + 1]."""
    runs = np.zeros((flags.shape[0], flags.shape[1] + 1), np.int64)
    for column in reversed(range(flags.shape[1])):
        runs[:, column] = np.where(flags[:, column], runs[:, column + 1] + 1, 0)
    return runs


def _may_override(
    batch: Batch, request: np.ndarray, position: np.ndarray, rows: np.ndarray, overrides: np.ndarray
) -> np.ndarray:
    """Which of these mismatches the policy may decide: bool, one per request given."""
    state = batch.requests
    row = torch.from_numpy(rows[request, position])
    token = batch.draft_tokens[row].long()
    if batch.legal is not None:
        legal = batch.legal[row]
    else:
        vocabulary = batch.raw_target_logits.shape[1]
        logit_row = row if batch.logit_rows is None else batch.logit_rows[row]
        legal = batch.processed_target_logits[logit_row, token.clamp(max=vocabulary - 1)].isfinite()
        legal &= token < vocabulary
    within_budget = state.overrides_so_far[request] + overrides[request] < state.max_overrides[request]
    inexact = state.output_position[request] + position >= state.exact_tokens[request]
    return legal.numpy() & within_budget & inexact


def _regret(batch: Batch, row: np.ndarray) -> np.ndarray:
    """What keeping each of these drafts gives up, rounded up to a unit; infinite where it is no number: float64 [M]."""
    index = torch.from_numpy(row)
    logit_row = index if batch.logit_rows is None else batch.logit_rows[index]
    token = batch.draft_tokens[index].long().clamp(max=batch.raw_target_logits.shape[1] - 1)
    top = batch.raw_target_logits[logit_row, batch.raw_argmax[index].long()].float()
    given_up = (top - batch.raw_target_logits[logit_row, token].float()).numpy().astype(np.float64)
    return np.where(np.isfinite(given_up), np.ceil(given_up / REGRET_UNIT) * REGRET_UNIT, np.inf)


def _affordable(state: Requests, request: np.ndarray, spent: np.ndarray, given_up: np.ndarray) -> np.ndarray:
    """Whether each request's budget has room: bool [M]. Where it is 0 it has none, ties included."""
    budget = state.max_regret[request]
    total = state.regret_so_far[request] + spent[request] + given_up
    return (budget == np.inf) | ((budget > 0) & (total <= budget))


def _gather(
    batch: Batch,
    request: np.ndarray,
    position: np.ndarray,
    row: np.ndarray,
    context: np.ndarray,
    native_run: np.ndarray,
) -> Mismatches:
    index = torch.from_numpy(row)
    target = batch.raw_target_logits[index if batch.logit_rows is None else batch.logit_rows[index]].float()
    token = batch.draft_tokens[index].long()
    top = batch.raw_argmax[index].long()
    draft = None if batch.draft_logits is None else batch.draft_logits(request, position).float()
    statistics = torch.empty(len(row), NUM_STATISTICS)
    statistics[:, :10] = logit_statistics(target, draft, token, top)
    statistics[:, 10:] = torch.from_numpy(context)
    return Mismatches(
        statistics=statistics,
        target_logit_draft=target.gather(1, token.unsqueeze(1)).squeeze(1),
        target_logit_top=target.gather(1, top.unsqueeze(1)).squeeze(1),
        draft_token=token,
        target_token=top,
        output_position=torch.from_numpy(batch.requests.output_position[request] + position),
        natively_accepted_after=torch.from_numpy(native_run),
        block_remaining=torch.from_numpy(batch.num_draft_tokens[request] - position - 1),
        acceptance_ratio=torch.zeros(len(row)) if batch.acceptance_ratio is None else batch.acceptance_ratio[index],
        uniform=torch.ones(len(row)) if batch.uniform is None else batch.uniform[index],
        top_k_entropy=lambda k: top_k_entropy(target, k),
        divergence=lambda kind: divergence(target, _present(draft), kind),
        mixture_lead=lambda weight: mixture_lead(target, _present(draft), token, weight),
    )


def _emit(batch: Batch, num_accepted: np.ndarray, rows: np.ndarray) -> Tensor:
    """Build the output, int32 [B, width + 1]: accepted drafts, then the target's or the bonus token."""
    num_requests, width = rows.shape
    output = np.full((num_requests, width + 1), PLACEHOLDER, np.int32)
    if len(batch.draft_tokens):
        drafts = batch.draft_tokens.numpy()[rows]
        output[:, :width] = np.where(np.arange(width) < num_accepted[:, None], drafts, PLACEHOLDER)
    every = np.arange(num_requests)
    complete = num_accepted == batch.num_draft_tokens
    last = batch.bonus_tokens.numpy().copy()
    if not complete.all():
        stopped = every[~complete]
        last[stopped] = batch.target_tokens.numpy()[rows[stopped, num_accepted[stopped]]]
    output[every, num_accepted] = last
    return torch.from_numpy(output)
