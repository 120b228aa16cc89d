"""Arbitration on the CPU: full statistics only for the mismatches a decision is needed for.

There is no device to synchronise with, so compiled loops walk through the blocks, :mod:`vllm_cospec.kernels.loops`:
strict verification's verdict on every position is an input, and each round takes the next mismatch of every request at
once. Typically one or two rounds end a step. Only the rows of those mismatches are read, nothing of the size of the
logits is written. Decisions equal those of :mod:`vllm_cospec.kernels.reference`.

NaN: a statistic is NaN where a row of logits it comes from has a NaN or no finite logit. Such a mismatch is strict,
whatever the policy or a decision made beforehand says, and is not recorded.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.batch import Batch, BatchResult, Consulted, LogitRows, Tokens
from vllm_cospec.kernels.policies import Mismatches, Rule
from vllm_cospec.kernels.statistics import LOGPROB_FLOOR, NUM_STATISTICS, TINY

PLACEHOLDER = -1  # pads the output, as vLLM's own rejection sampler does

Decide = Callable[["Found"], tuple[np.ndarray, np.ndarray | None]]
"""Mismatches -> (kept, bool [M]; probability of keeping, float32 [M], or None)."""


class _Compiled:
    """The modules of compiled loops, which take a second to import, and some to compile the first time."""

    @functools.cached_property
    def loops(self) -> ModuleType:
        return importlib.import_module("vllm_cospec.kernels.loops")

    @functools.cached_property
    def walk(self) -> ModuleType:
        return importlib.import_module("vllm_cospec.kernels.walk")


_compiled = _Compiled()


def warm_up(num_tensors: int) -> None:
    """Compile what verification calls, or load what was compiled before.

    Args:
        num_tensors: that the draft's rows lie in, see :class:`LogitRows`; 0 for a drafter without logits.
    """
    row, one = torch.zeros(1, 2), np.zeros(1, np.int64)
    rows = LogitRows([row] * num_tensors, one, one) if num_tensors else None
    flat = None if rows is None else _Flat.of(rows.tensors, 2)
    out = np.zeros((1, NUM_STATISTICS), np.float32)
    _fill_in(out, np.zeros(1, bool), (*_flat(row), 2), one, rows, flat, one, one)
    _compiled.walk  # noqa: B018 - compiled when it is imported


def logit_statistics(target: Tensor, draft: Tensor | None, token: Tensor, top: Tensor) -> Tensor:
    """Return the ten statistics that come from logits, float32 [M, 10], in schema order.

    Args:
        target: raw target logits of M mismatches, float32 [M, V].
        draft: raw draft logits, float32 [M, V], or None.
        token: d, int64 [M].
        top: t*, int64 [M].
    """
    out, every = np.empty((len(target), NUM_STATISTICS), np.float32), np.arange(len(target))
    draft_rows, vocabulary = None if draft is None else LogitRows.of(draft), target.shape[1]
    flat = None if draft_rows is None else _Flat.of(draft_rows.tensors, vocabulary)
    sound, where = np.empty(len(target), bool), (*_flat(target), vocabulary)
    _fill_in(out, sound, where, every, draft_rows, flat, token.numpy(), top.numpy())
    return torch.from_numpy(out[:, :10])


def argmax(logits: Tensor) -> Tensor:
    """Return the index of each row's maximum, int64 [N], as ``logits.argmax(-1)`` does: NaN counts as the largest.

    numpy's is many times faster than torch's on a CPU.
    """
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _flat(logits: Tensor) -> tuple[np.ndarray, int]:
    """Return rows of logits, [R, V], as one float32 vector that holds them, and how far apart they begin."""
    (count, vocabulary), (stride, step) = logits.shape, logits.stride()
    if logits.dtype != torch.float32 or step != 1 or stride < vocabulary:
        logits = logits.float().contiguous()
        stride = logits.stride(0)
    size = stride * (count - 1) + vocabulary if count else 0
    return logits.as_strided((size,), (1,)).numpy(), stride


@dataclass(frozen=True)
class _Flat:
    """Some tensors of rows, each as :func:`_flat` gives it."""

    tensors: Sequence[Tensor]
    vectors: tuple[np.ndarray, ...]
    strides: np.ndarray  # int64 [len(vectors)]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], vocabulary: int) -> _Flat:
        """Look at them in that way; raises ValueError for rows of another length than ``vocabulary``."""
        if any(tensor.shape[1] != vocabulary for tensor in tensors):
            raise ValueError("target and draft have vocabularies of different sizes")
        flat = [_flat(tensor) for tensor in tensors]
        flat += flat[:1] * ((1 << (len(flat) - 1).bit_length()) - len(flat))  # each length is compiled by itself
        vectors, strides = zip(*flat, strict=True)
        return cls(tensors, vectors, np.array(strides, np.int64))


def _fill_in(
    out: np.ndarray, sound: np.ndarray, target: tuple[np.ndarray, int, int], row: np.ndarray,
    draft: LogitRows | None, flat: _Flat | None, token: np.ndarray, top: np.ndarray,
) -> None:  # fmt: skip
    """Write the first ten columns of statistics, see :func:`vllm_cospec.kernels.loops.logit_statistics`.

    ``target`` is given as its vector, its stride and V, ``flat`` is what the rows of ``draft`` lie in.
    """
    logits, stride, vocabulary = target
    none = np.zeros(len(row), np.int64)
    vectors: tuple[np.ndarray, ...] = (logits,)
    strides, part, draft_row = none[:0], none, none
    if draft is not None and flat is not None:
        vectors, strides, part, draft_row = flat.vectors, flat.strides, draft.part, draft.row
    _compiled.loops.logit_statistics(
        out, sound, logits, stride, row, vectors, strides, part, draft_row, token, top, vocabulary
    )


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


@dataclass(frozen=True)
class Found:
    """M mismatches that the policy is to decide."""

    batch: Batch
    request: np.ndarray  # int64 [M], index into the batch
    position: np.ndarray  # int64 [M], in the block
    output_position: np.ndarray  # int64 [M], in the response
    statistics: np.ndarray  # float32 [M, 16]
    sound: np.ndarray  # bool [M], whether none of them is NaN
    natively_accepted_after: np.ndarray  # int64 [M], and so on: see Mismatches
    draft_token: np.ndarray
    target_token: np.ndarray
    logits: np.ndarray  # float32 [2, M], target logits of d and t*
    draft: np.ndarray  # int64 [M], index into the batch's drafts
    logit_row: np.ndarray  # int64 [M], of the raw target logits
    draft_logits: LogitRows | None

    def mismatches(self) -> Mismatches:
        """Return them as rules take them."""
        batch, count = self.batch, len(self.request)
        token, index = torch.from_numpy(self.draft_token), torch.from_numpy(self.draft)
        return Mismatches(
            statistics=torch.from_numpy(self.statistics),
            target_logit_draft=torch.from_numpy(self.logits[0]),
            target_logit_top=torch.from_numpy(self.logits[1]),
            draft_token=token,
            target_token=torch.from_numpy(self.target_token),
            output_position=torch.from_numpy(self.output_position),
            natively_accepted_after=torch.from_numpy(self.natively_accepted_after),
            block_remaining=torch.from_numpy(batch.num_draft_tokens[self.request] - self.position - 1),
            acceptance_ratio=torch.zeros(count) if batch.acceptance_ratio is None else batch.acceptance_ratio[index],
            uniform=torch.ones(count) if batch.uniform is None else batch.uniform[index],
            top_k_entropy=lambda k: top_k_entropy(self._target(), k),
            divergence=lambda kind: divergence(self._target(), self._drafts(), kind),
            mixture_lead=lambda weight: mixture_lead(self._target(), self._drafts(), token, weight),
        )

    def _target(self) -> Tensor:
        return self.batch.raw_target_logits[torch.from_numpy(self.logit_row)].float()

    def _drafts(self) -> Tensor:
        assert self.draft_logits is not None, "policies that read the draft's rows need a drafter that has some"
        return self.draft_logits.stack()


def rule(policy: Rule) -> Decide:
    """Return a rule as :func:`verify_batch` takes it."""
    return lambda found: (policy.keep(found.mismatches()).numpy(), None)


class Network:
    """An arbiter's network, for the loops: a call of torch's takes longer than all it says of a step."""

    def __init__(self, mean: Tensor, scale: Tensor, layers: Sequence[tuple[Tensor, Tensor]]):
        """Copy the weights.

        Args:
            mean, scale: float32 [16].
            layers: weight [out, in] and bias [out] of each.
        """
        parts = [mean, scale, *(part for weight, bias in layers for part in (weight.T.reshape(-1), bias))]
        self._weights = torch.cat(parts).detach().float().numpy()
        self._sizes = np.array([NUM_STATISTICS, *(len(bias) for _, bias in layers)], np.int64)

    def scores(self, statistics: np.ndarray) -> np.ndarray:
        """Map statistics, float32 [M, 16], to scores in (0, 1), float32 [M]."""
        out = np.empty(len(statistics), np.float32)
        _compiled.loops.scores(statistics, self._weights, self._sizes, out)
        return out


class _Walk:
    """The walk through the blocks of a step: its arrays, and calls of the loops that go on with it."""

    def __init__(self, batch: Batch):
        self._batch, requests = batch, batch.requests
        num_requests, width = len(batch.num_draft_tokens), batch.max_draft_tokens
        self._drafts, self._best = _integers(batch.draft_tokens), _integers(batch.raw_argmax)
        self._first = np.zeros(num_requests + 1, np.int64)
        np.cumsum(batch.num_draft_tokens, out=self._first[1:])
        self._vocabulary = batch.raw_target_logits.shape[1]
        self._logits, self._stride = _flat(batch.raw_target_logits)
        self._flat: _Flat | None = None  # what the draft's rows lie in
        self._row = np.arange(len(self._drafts)) if batch.logit_rows is None else _integers(batch.logit_rows)
        legal = _legal(batch, self._row) if batch.legal is None else _array(batch.legal)
        ends = np.full((num_requests, 1), UNLIMITED, np.int64) if batch.ends is None else batch.ends
        self._position, self._found = np.zeros(num_requests, np.int64), np.empty((5, num_requests), np.int64)
        self.overrides, self.mismatches = np.zeros(num_requests, np.int64), np.zeros(num_requests, np.int64)
        self.regret, self._given_up = np.zeros(num_requests), np.empty(num_requests)
        self.overrides_per_position = np.zeros(width, np.int64)
        self._waiting = np.ones(num_requests, bool)
        self._pair = np.empty((2, num_requests), np.float32)
        self._step = (
            self._first, self._drafts, _array(batch.accepted), self._best, legal, ends, self._logits, self._stride,
            self._row, self._vocabulary, requests.arbitrated & ~requests.junk, requests.output_position,
            requests.overrides_so_far, requests.max_overrides, requests.exact_tokens, requests.regret_so_far,
            requests.max_regret, batch.num_speculative_tokens, self._position, self.overrides, self.regret,
            self.mismatches, self._waiting, self._found, self._given_up, self._pair,
        )  # fmt: skip

    def advance(self) -> Found | None:
        """Return the next mismatch of every request that goes on, None where there is none."""
        statistics = np.empty((len(self._position), NUM_STATISTICS), np.float32)
        count = _compiled.walk.advance(*self._step, statistics)
        if not count:
            return None
        batch, request, at = self._batch, self._found[0, :count].copy(), self._found[1, :count].copy()
        native, token, top = self._found[2:, :count].copy()
        statistics, sound, index = statistics[:count], np.empty(count, bool), self._first[request] + at
        row = self._row[index]
        draft = None if batch.draft_logits is None else batch.draft_logits(request, at)
        if draft is not None and (self._flat is None or draft.tensors is not self._flat.tensors):
            self._flat = _Flat.of(draft.tensors, self._vocabulary)  # most often once a step
        where = self._logits, self._stride, self._vocabulary
        _fill_in(statistics, sound, where, row, draft, self._flat, token, top)
        return Found(
            batch, request, at, batch.requests.output_position[request] + at, statistics, sound, native, token, top,
            self._pair[:, :count].copy(), index, row, draft,
        )  # fmt: skip

    def settle(self, keep: np.ndarray) -> None:
        """Let the requests go on whose drafts are kept, bool [M] as :meth:`advance` has found them."""
        _compiled.walk.settle(
            keep, self._found, self._given_up, self._position, self.overrides, self.regret, self._waiting,
            self.overrides_per_position,
        )  # fmt: skip

    def emit(self) -> Tensor:
        """Return what every request emits, int32 [B, width + 1]."""
        batch = self._batch
        output = np.empty((len(self._position), batch.max_draft_tokens + 1), np.int32)
        _compiled.walk.emit(
            self._first, self._drafts, _integers(batch.target_tokens), _integers(batch.bonus_tokens), self._position,
            output,
        )  # fmt: skip
        return torch.from_numpy(output)


def verify_batch(batch: Batch, decide: Decide, collect: bool = False) -> BatchResult:
    """Verify one step of a batch.

    Args:
        batch: the step; its tensors are only read.
        decide: the policy.
        collect: keep every consulted mismatch in the result.
    """
    walk, requests, consulted = _Walk(batch), batch.requests, []
    while (found := walk.advance()) is not None:
        keep, probability = decide(found)
        kept = keep & found.sound  # NaN anywhere in a row: strict, and nothing to learn from
        if requests.forced_at is not None and requests.forced_keep is not None:
            forced_at, where = requests.forced_at[found.request], found.output_position
            forced = (where < forced_at) | requests.forced_keep[found.request]
            kept = np.where(where <= forced_at, forced, kept) & found.sound
        if collect:
            everything = Consulted(
                found.request, found.position, found.output_position, found.statistics, kept, probability
            )
            consulted.append(everything if found.sound.all() else everything.only(found.sound))
        walk.settle(kept)
    return BatchResult(
        walk.emit(), walk.mismatches, walk.overrides, walk.regret, walk.overrides_per_position, consulted
    )


@dataclass(frozen=True)
class GreedyVerdicts:
    """What strict verification says of N drafts of greedy requests, each by itself."""

    drafts: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [N], of the logits
    best: np.ndarray  # int64 [N], t*, which is emitted where the draft is not kept
    accepted: np.ndarray  # bool [N]
    legal: np.ndarray  # bool [N], tokens with a finite logit


def greedy_verdicts(draft_tokens: Tensor, rows: Tensor, logits: Tensor) -> GreedyVerdicts:
    """Decide drafts [N] as strict verification does where requests are greedy, with some rows of logits [*, V]."""
    count, (vector, stride) = draft_tokens.shape[0], _flat(logits)
    integers, flags = np.empty((3, count), np.int64), np.empty((2, count), bool)
    _compiled.loops.greedy_verdicts(
        draft_tokens.int().numpy(), rows.int().numpy(), vector, stride, logits.shape[1], *integers, *flags
    )
    return GreedyVerdicts(*integers, *flags)


def _array(values: Tokens) -> np.ndarray:
    return values.numpy() if isinstance(values, Tensor) else values


def _integers(tokens: Tokens) -> np.ndarray:
    """Return int64 as the loops take it; a copy where it is something else."""
    return tokens.long().contiguous().numpy() if isinstance(tokens, Tensor) else tokens


def _legal(batch: Batch, row: np.ndarray) -> np.ndarray:
    """Return where the processed logit of the draft is finite, bool [N]."""
    token = torch.as_tensor(batch.draft_tokens).long().clamp(0, batch.raw_target_logits.shape[1] - 1)
    return batch.processed_target_logits[torch.from_numpy(row), token].isfinite().numpy()
