"""Model Runner V1: what both of its samplers do before and after the blocks are scanned.

Batches in which no request is arbitrated go to the stock sampler. In the others stock's own functions process the
logits and draw the bonus tokens, the uniform numbers and the recovered tokens in stock's order, so that every random
number is the one strict verification would have drawn; only the scan of the blocks is ours. Requests that are strict
in a mixed batch therefore get exactly the stock's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.rejection_sampler import (
    GREEDY_TEMPERATURE,
    RejectionSampler,
    apply_sampling_constraints,
    generate_uniform_probs,
    sample_recovered_tokens,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_cospec.health import REASONS, Reason
from vllm_cospec.runners.seeds import ThrownAwayDraws
from vllm_cospec.runners.v1_drafter import V1Drafter


@dataclass
class V1Step:
    """One step of B requests with N drafts in all."""

    metadata: SpecDecodeMetadata
    sampling: Any  # vLLM's SamplingMetadata
    logits: Tensor  # [N + B, V], after the grammar mask
    raw: Tensor  # [N, V] float32
    processed: Tensor  # like ``raw``, what tokens are drawn from
    legal: Tensor  # [N] bool, what the request's own settings allow
    bonus_tokens: Tensor  # [B, 1]
    draft_probabilities: Tensor | None  # [N, V] float32
    draws: Draws | None  # None when every request is greedy


@dataclass
class Draws:
    """What stock draws to verify N drafts."""

    uniform: Tensor  # [N] float64
    probabilities: Tensor  # [N, V] float32, of the target
    recovered: Tensor  # [N] int32


@dataclass
class StepNotes:
    """What is noted of a step's requests: not in attributes of the sampler, a module of torch's, which takes long."""

    left_out: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """[B], requests that want to be arbitrated and whose drafts are not whole."""


@dataclass(frozen=True)
class StrictVerdict:
    """What strict verification says of each of N draft positions by itself."""

    accepted: Tensor  # [N] bool
    target_tokens: Tensor  # [N] int64, emitted where the draft is not kept
    argmax: Tensor  # [N] int64, of the processed logits
    acceptance_ratio: Tensor | None  # [N] float32, None when every request is greedy
    uniform: Tensor | None  # [N] float32


class V1Sampler(RejectionSampler):
    """Verifies drafts with a policy at the mismatches."""

    recorder: V1Drafter
    strict = False
    """Whether every request is verified strictly."""

    def __init__(self, runner: Any):
        super().__init__(runner.rejection_sampler.sampler, runner.speculative_config, runner.device)
        self._runner = runner
        self._thrown_away = ThrownAwayDraws(runner)
        self._notes = StepNotes()

    def open_step(self, request_ids: Sequence[str]) -> None:
        """A step of the runner's batch begins: take what was proposed for it."""
        raise NotImplementedError

    def find_probabilities(
        self, metadata: SpecDecodeMetadata, given: Tensor | None, sampling_metadata: Any
    ) -> Tensor | None:
        """Return what the drafts were drawn from, [N, V]; ``given`` is what the runner found."""
        raise NotImplementedError

    def find_wanted(self) -> np.ndarray:
        """Return which requests of the step want to be arbitrated, bool [B]."""
        raise NotImplementedError

    def find_reasons(self, metadata: SpecDecodeMetadata) -> list[Reason | None]:
        """Return why the drafts of each request are not whole, None where they are, as far as the host knows."""
        raise NotImplementedError

    def count_unhealthy(self, positions: np.ndarray) -> None:
        """Count positions that are verified strictly, int64 [R] in the order of ``REASONS``."""
        raise NotImplementedError

    def scan(self, step: V1Step) -> Tensor:
        """Decide; returns the tokens of every request, int32 [B, max_spec_len + 1], padded with -1."""
        raise NotImplementedError

    def scan_unprocessed(self, metadata: SpecDecodeMetadata, logits: Tensor, bonus_tokens: Tensor) -> Tensor | None:
        """Decide a step whose logits reach verification as they are, as :meth:`scan`; None where they need a copy."""
        return None

    def follow_stock(self, metadata: SpecDecodeMetadata, tokens: Tensor) -> None:
        """Take in what a step without arbitrated requests has emitted, [B, max_spec_len + 1], padded with -1."""

    def best_tokens(self, logits: Tensor) -> Tensor:
        """Return the index of each row's maximum, int64 [N]."""
        return logits.argmax(dim=-1)

    def forward(
        self, metadata: SpecDecodeMetadata, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any
    ) -> SamplerOutput:
        """Verify one step; arguments and result are those of the stock sampler.

        Args:
            metadata: which rows are drafts, which are bonus rows.
            draft_probs: [N, V] float32, or None for drafts without probabilities.
            logits: [N + B, V] target logits after the grammar mask.
            sampling_metadata: of the batch.
        """
        request_ids = self._runner.input_batch.req_ids
        if len(request_ids) != len(metadata.num_draft_tokens):  # vLLM's dummy batches
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        self._thrown_away.hide()
        self.recorder.computed()
        self.open_step(request_ids)
        placeholders = self.recorder.find_placeholders(request_ids, metadata.num_draft_tokens)
        if placeholders.any():
            metadata, draft_probs, logits, sampling_metadata = _without(
                placeholders, metadata, draft_probs, logits, sampling_metadata
            )
        draft_probs = self.find_probabilities(metadata, draft_probs, sampling_metadata)
        # When all drafts of a step were trimmed away, stock's top-k fails on the CPU for want of a row.
        stock_fails = not len(metadata.draft_token_ids) and sampling_metadata.top_k is not None
        if not self._find_arbitrated(metadata) and not stock_fails:
            stock = super().forward(metadata, draft_probs, logits, sampling_metadata)
            self.follow_stock(metadata, stock.sampled_token_ids)
            return stock
        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            # as stock, but without a copy of the logits when nobody asked for logprobs
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1)
            if sampling_metadata.max_num_logprobs is not None
            else sampling_metadata,
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )
        untouched = unprocessed(sampling_metadata)
        output = self.scan_unprocessed(metadata, logits, bonus.sampled_token_ids) if untouched else None
        if output is not None:
            return SamplerOutput(sampled_token_ids=output, logprobs_tensors=None)
        step = self._process(metadata, draft_probs, logits, bonus.sampled_token_ids, sampling_metadata, untouched)
        output = self.scan(step)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                step.processed if self.is_processed_logprobs_mode else step.raw,
                bonus.logprobs_tensors.logprobs,
                output,
            )
        return SamplerOutput(sampled_token_ids=output, logprobs_tensors=logprobs)

    def _find_arbitrated(self, metadata: SpecDecodeMetadata) -> bool:
        """Match the drafts with what was proposed; returns whether any of the requests is arbitrated."""
        wanted = self.find_wanted() & (not self.strict)
        self._notes.left_out = np.zeros(len(wanted), bool)
        if not wanted.any():
            return False
        unhealthy = np.zeros(len(REASONS), np.int64)
        for i, (reason, n) in enumerate(zip(self.find_reasons(metadata), metadata.num_draft_tokens, strict=True)):
            if reason is not None and wanted[i]:
                self._notes.left_out[i] = True
                unhealthy[REASONS.index(reason)] += n or self._decodes(i)
        if unhealthy.any():
            self.count_unhealthy(unhealthy)
        return bool((wanted & ~self._notes.left_out).any())

    def _decodes(self, index: int) -> bool:
        """Whether a request of the batch goes on with its response: nothing is drafted for what comes before."""
        cached = self._runner.requests[self._runner.input_batch.req_ids[index]]
        return bool(cached.output_token_ids) and not self._runner.discard_request_mask.np[index]

    def strict_verdict(self, step: V1Step) -> StrictVerdict:
        """Decide every position as strict verification does."""
        drafts = step.metadata.draft_token_ids.long()
        best = self.best_tokens(step.processed) if len(drafts) else drafts
        if step.draws is None:
            return StrictVerdict(drafts == best, best, best, None, None)
        uniform = step.draws.uniform
        index = drafts.clamp(0, step.processed.shape[1] - 1).unsqueeze(1)
        p = step.draws.probabilities.gather(1, index).squeeze(1)
        q = torch.ones_like(p)
        if step.draft_probabilities is not None:
            q = step.draft_probabilities.gather(1, index).squeeze(1)
        possible = (drafts >= 0) & (q > 0)
        ratio = torch.where(possible, p / q, 0.0)
        sampled = _of_each_draft(step.sampling.temperature != GREEDY_TEMPERATURE, step.metadata)
        return StrictVerdict(
            accepted=torch.where(sampled, possible & (ratio >= uniform), drafts == best),  # in float64, as stock
            target_tokens=torch.where(sampled, step.draws.recovered.long(), best),
            argmax=best,
            acceptance_ratio=torch.where(sampled, ratio, 0.0),
            uniform=torch.where(sampled, uniform, 1.0).float(),
        )

    def _process(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        bonus_tokens: Tensor,
        sampling_metadata: Any,
        untouched: bool,  # see :func:`unprocessed`
    ) -> V1Step:
        """Process the logits as stock does, and draw its random numbers."""
        drafts = metadata.draft_token_ids
        raw = processed = logits[metadata.target_logits_indices].to(torch.float32)
        index = drafts.long().clamp(0, logits.shape[1] - 1)
        legal = known = drafts == index
        if len(drafts):
            if not untouched:
                processed = self.apply_logits_processors(raw.clone(), sampling_metadata, metadata)
            legal = known & processed.gather(1, index.unsqueeze(1)).squeeze(1).isfinite()
            if not untouched:
                processed = apply_sampling_constraints(processed, metadata.cu_num_draft_tokens, sampling_metadata)
                legal &= _allowed_by_own(sampling_metadata, metadata, processed, index)
        step = V1Step(metadata, sampling_metadata, logits, raw, processed, legal, bonus_tokens, draft_probs, None)
        if len(drafts) and not sampling_metadata.all_greedy:
            step.draws = self._draw(metadata, draft_probs, processed, sampling_metadata)
        return step

    def _draw(
        self, metadata: SpecDecodeMetadata, draft_probs: Tensor | None, processed: Tensor, sampling_metadata: Any
    ) -> Draws:
        """Draw what stock's ``rejection_sample`` would draw, in its order."""
        uniform = generate_uniform_probs(
            len(metadata.draft_token_ids), metadata.num_draft_tokens, sampling_metadata.generators, processed.device
        )
        probabilities = processed.softmax(dim=-1, dtype=torch.float32)
        recovered = sample_recovered_tokens(
            metadata.max_spec_len,
            metadata.num_draft_tokens,
            metadata.cu_num_draft_tokens,
            metadata.draft_token_ids,
            draft_probs,
            probabilities,
            sampling_metadata,
            processed.device,
            self.use_fp64_gumbel,
        )
        return Draws(uniform, probabilities, recovered)


def _of_each_draft(values: Tensor, metadata: SpecDecodeMetadata) -> Tensor:
    """Repeat what is known of each request for each of its drafts, [B] -> [N]; nothing waits for the device."""
    counts = async_tensor_h2d(np.array(metadata.num_draft_tokens, np.int64), values.device)
    return values.repeat_interleave(counts, output_size=sum(metadata.num_draft_tokens))


def _allowed_by_own(
    sampling_metadata: Any, metadata: SpecDecodeMetadata, processed: Tensor, index: Tensor
) -> Tensor | bool:
    """Which drafts top-k and top-p leave to the requests that set them, bool [N].

    vLLM masks rows of the others too, as soon as one request sets them: tokens whose probability rounds to zero.
    """
    restricted = None
    for values, nothing in ((sampling_metadata.top_k, processed.shape[1]), (sampling_metadata.top_p, 1)):
        if values is not None:
            own = values < nothing
            restricted = own if restricted is None else restricted | own
    if restricted is None:
        return True
    return ~_of_each_draft(restricted, metadata) | processed.gather(1, index.unsqueeze(1)).squeeze(1).isfinite()


def _without(
    placeholders: np.ndarray,
    metadata: SpecDecodeMetadata,
    draft_probs: Tensor | None,
    logits: Tensor,
    sampling_metadata: Any,
) -> tuple[SpecDecodeMetadata, Tensor | None, Tensor, Any]:
    """Leave out the placeholders vLLM pads a request with when others decode: alone it would draw nothing for them."""
    counts = np.array(metadata.num_draft_tokens, np.int64)
    owner = np.repeat(np.arange(len(counts)), counts + 1)  # of each row
    local = np.concatenate([np.arange(n + 1) for n in counts])
    kept_rows = ~placeholders[owner] | (local == 0)
    kept_drafts = np.flatnonzero(~placeholders[np.repeat(np.arange(len(counts)), counts)])
    counts = np.where(placeholders, 0, counts)
    ends = np.cumsum(counts + 1)
    device = logits.device
    rows = async_tensor_h2d(np.flatnonzero(kept_rows), device)
    drafts = async_tensor_h2d(kept_drafts, device)

    def on_device(values: np.ndarray) -> Tensor:
        return async_tensor_h2d(values.astype(np.int32), device)

    reduced = SpecDecodeMetadata(
        draft_token_ids=metadata.draft_token_ids[drafts],
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=on_device(np.cumsum(counts)),
        cu_num_sampled_tokens=on_device(ends),
        target_logits_indices=on_device(np.setdiff1d(np.arange(ends[-1]), ends - 1)),
        bonus_logits_indices=on_device(ends - 1),
        logits_indices=metadata.logits_indices[rows],
    )
    reduced.max_spec_len = metadata.max_spec_len  # the width the runner expects of the output
    spec_token_ids = sampling_metadata.spec_token_ids
    if spec_token_ids is not None:
        spec_token_ids = [[] if hidden else own for own, hidden in zip(spec_token_ids, placeholders, strict=False)]
        sampling_metadata = replace(sampling_metadata, spec_token_ids=spec_token_ids)
    return reduced, None if draft_probs is None else draft_probs[drafts], logits[rows], sampling_metadata


def unprocessed(sampling_metadata: Any) -> bool:
    """Whether a batch's logits reach verification as the model gave them, and nobody wants them afterwards.

    Everything that vLLM's ``apply_logits_processors`` and ``apply_sampling_constraints`` do is ruled out here.
    """
    holder = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.all_greedy
        and sampling_metadata.max_num_logprobs is None
        and sampling_metadata.no_penalties
        and not sampling_metadata.bad_words_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
        and not any(  # the only processor that stock applies to draft rows
            isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant
        )
        and not (holder is not None and holder.has_tracked_requests())
    )
