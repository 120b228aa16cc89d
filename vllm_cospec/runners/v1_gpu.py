"""Model Runner V1 on a GPU: stock's random numbers, then the fused Triton path.

Batches in which no request is arbitrated go to the stock sampler untouched. In the others stock's own functions process
the logits, draw the uniform numbers, the recovered tokens and the bonus tokens in stock's order, and the fused path
scans the blocks with the verdict that follows from them. The rows of logits lie as on V2: those of a request one after
the other, its bonus row last. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.rejection_sampler import (
    PLACEHOLDER_TOKEN_ID,
    RejectionSampler,
    apply_sampling_constraints,
    generate_uniform_probs,
    sample_recovered_tokens,
)

from vllm_cospec import compat, hooks
from vllm_cospec.config import WHERE, Settings
from vllm_cospec.errors import CompatibilityError
from vllm_cospec.kernels.triton.launch import Server, arbitrate_given, warm_up
from vllm_cospec.kernels.triton.step import Rows, Verdict
from vllm_cospec.metrics import Counters, counters_of_this_rank
from vllm_cospec.runners.device import DeviceCounters, DevicePolicy, TracedStep
from vllm_cospec.runners.slots import PlacedSlots

logger = init_logger("vllm.cospec")

NOTHING_PROPOSED = -2  # no token, and not vLLM's placeholder either


class DeviceRecorder:
    """Wraps the drafter of a runner: what it proposes in each slot, tokens and raw logits, stays on the device."""

    def __init__(self, runner: Any, settings: Settings, table: PlacedSlots):
        k = settings.num_speculative_tokens
        self._runner = runner
        self._drafter = drafter = runner.drafter
        self._table = table
        self.tokens = torch.full((table.size, k), NOTHING_PROPOSED, dtype=torch.int32, device=runner.device)
        self.logits: Tensor | None = None  # [S, K, V]
        self._slots: Tensor | None = None  # [B] of the batch that is being drafted for
        self._step = 0
        self._propose = compat.wrap(f"{hooks.PROPOSER}.propose", drafter, self.propose)
        if settings.draft_logits:
            config = runner.model_config
            self.logits = torch.full(
                (table.size, k, config.get_vocab_size()), -torch.inf, dtype=config.head_dtype, device=runner.device
            )
            compat.wrap(f"{hooks.PROPOSER}._sample_draft_tokens", drafter, self.sample_draft_tokens)

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """As the drafter's: [B, K] tokens on the device, or lists from drafters on the host."""
        slots = async_tensor_h2d(self._table.place(), self._runner.device)
        self._slots, self._step = slots, 0
        proposed = self._propose(*args, **kwargs)
        self._slots = None
        self.tokens.fill_(NOTHING_PROPOSED)
        tokens = proposed[0] if isinstance(proposed, tuple) else proposed  # ngram_gpu counts its drafts as well
        if isinstance(tokens, list):
            padded = np.full((len(tokens), self.tokens.shape[1]), NOTHING_PROPOSED, np.int32)
            for row, own in zip(padded, tokens, strict=True):
                row[: len(own)] = own
            tokens = async_tensor_h2d(padded, self._runner.device)
        self.tokens[slots, : tokens.shape[1]] = tokens.to(torch.int32)
        return proposed

    def sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """As the stock ``_sample_draft_tokens``: [B, H] -> (tokens [B], probabilities [B, V] or None)."""
        logits = self._drafter.model.compute_logits(hidden_states)
        if self._slots is not None and self.logits is not None:
            # sampling divides by the temperature in place; this is a copy
            width = min(logits.shape[1], self.logits.shape[2])
            self.logits[self._slots, self._step, :width] = logits[:, :width].to(self.logits.dtype)
            self._step += 1
        return self._drafter._sample_from_logits(logits, sampling_metadata)


class CoSpecRejectionSampler(DevicePolicy, RejectionSampler):
    """Verifies drafts on the device with a policy at the mismatches."""

    def __init__(self, runner: Any, settings: Settings, counters: Counters | None):
        super().__init__(runner.rejection_sampler.sampler, runner.speculative_config, runner.device)
        self._runner = runner
        self._table = PlacedSlots(runner, settings)
        self.recorder = DeviceRecorder(runner, settings, self._table)
        self._counters = DeviceCounters(counters, settings.num_speculative_tokens, runner.device)
        self.load_policy(settings, runner.device)

    def forward(
        self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any
    ) -> SamplerOutput:
        """Verify one step; arguments and result are those of the stock sampler.

        Args:
            metadata: which rows are drafts, which are bonus rows.
            draft_probs: [N, V] float32, or None for drafts without probabilities.
            logits: [N + B, V] target logits after the grammar mask.
            sampling_metadata: of the batch.
        """
        dummy = len(self._runner.input_batch.req_ids) != len(metadata.num_draft_tokens)
        slots = np.zeros(0, np.int64) if dummy or not sum(metadata.num_draft_tokens) else self._table.place()
        if not self._table.arbitrated(slots).any():
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )
        raw = logits[metadata.target_logits_indices].to(torch.float32)
        processed = raw if self.is_processed_logprobs_mode else raw.clone()
        processed = self.apply_logits_processors(processed, sampling_metadata, metadata)
        processed = apply_sampling_constraints(processed, metadata.cu_num_draft_tokens, sampling_metadata)
        output = self._arbitrate(
            metadata, draft_probs, logits, processed, bonus.sampled_token_ids, slots, sampling_metadata
        )
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                processed if self.is_processed_logprobs_mode else raw,
                bonus.logprobs_tensors.logprobs,
                output,
            )
        return SamplerOutput(sampled_token_ids=output, logprobs_tensors=logprobs)

    def _arbitrate(
        self,
        metadata: Any,
        draft_probs: Tensor | None,
        logits: Tensor,
        processed: Tensor,
        bonus_tokens: Tensor,
        slots: np.ndarray,
        sampling_metadata: Any,
    ) -> Tensor:
        """Return the tokens of every request, int32 [B, max_spec_len + 1], padded with ``PLACEHOLDER_TOKEN_ID``."""
        device, counts = logits.device, np.array(metadata.num_draft_tokens, np.int64)
        cu, local, request_slot, num_drafts, row_slot, request = _layout(counts, slots, device)
        draft_sampled = torch.full((logits.shape[0],), PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=device)
        draft_sampled[metadata.target_logits_indices + 1] = metadata.draft_token_ids.to(torch.int32)
        pos = self._runner.positions[metadata.logits_indices]
        table, seed = self._table.on_device()
        verdict = self._strict_verdict(metadata, draft_probs, processed, request, seed, sampling_metadata)
        rows = Rows(
            raw=logits, processed=logits, draft=self.recorder.logits, drafted=draft_sampled, first=cu, position=pos,
            request_slot=request_slot, slot=row_slot, step=local, num_steps=self._settings.num_speculative_tokens,
        )  # fmt: skip
        result = arbitrate_given(rows, verdict, table, self.program, self._counters.on_device)
        self.recorder.tokens.fill_(NOTHING_PROPOSED)  # verified once
        self._counters.export()
        if result.trace is not None:
            names = dict(zip(slots.tolist(), self._runner.input_batch.req_ids, strict=True))
            output_position = pos + 1 - table.response_start[row_slot]
            self._steps.append(TracedStep(names, row_slot, local, output_position, result.trace))

        column = torch.arange(metadata.max_spec_len + 1, device=device)
        kept, num_drafts = result.num_kept.unsqueeze(1), num_drafts.unsqueeze(1)
        stopped = result.tokens[:, : len(column)].to(torch.int32)
        output = torch.where((column < kept) | ((column == kept) & (kept < num_drafts)), stopped, PLACEHOLDER_TOKEN_ID)
        complete = (column == kept) & (kept == num_drafts)
        return torch.where(complete, bonus_tokens.view(-1, 1).to(torch.int32), output)

    def _strict_verdict(
        self, metadata: Any, draft_probs: Tensor | None, processed: Tensor, request: Tensor, seed: Tensor,
        sampling_metadata: Any,
    ) -> Verdict:  # fmt: skip
        """Draw what stock's ``rejection_sample`` would draw, in its order."""
        drafts, device = metadata.draft_token_ids.to(torch.int32), processed.device
        greedy = Verdict(drafts, request, self.recorder.tokens, processed, processed.argmax(dim=-1), seed)
        if sampling_metadata.all_greedy:
            return greedy
        uniform = generate_uniform_probs(len(drafts), metadata.num_draft_tokens, sampling_metadata.generators, device)
        probabilities = processed.softmax(dim=-1, dtype=torch.float32)
        recovered = sample_recovered_tokens(
            metadata.max_spec_len, metadata.num_draft_tokens, metadata.cu_num_draft_tokens, metadata.draft_token_ids,
            draft_probs, probabilities, sampling_metadata, device, self.use_fp64_gumbel,
        )  # fmt: skip
        return replace(
            greedy, temperature=sampling_metadata.temperature, probabilities=probabilities,
            draft_probabilities=draft_probs, recovered=recovered, uniform=uniform,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compile every kernel these settings can launch."""
        config = self._runner.model_config
        server = Server(
            config.get_vocab_size(), config.head_dtype, self.recorder.logits, self._settings.num_speculative_tokens,
            self._runner.device, given_verdict=True,
        )  # fmt: skip
        warm_up(server, self.program)


def _layout(counts: np.ndarray, slots: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """Lay out B requests with these numbers of drafts, typed as Model Runner V2 types them.

    Returns:
        int32: first row of each request and the number of rows [B + 1], index of each row in its request [R];
        int64: slot of each request [B], number of its drafts [B], slot of each row [R], request of each draft [N].
    """
    rows, every = counts + 1, np.arange(len(counts))
    cu = np.concatenate([[0], np.cumsum(rows)])
    local = np.arange(cu[-1]) - np.repeat(cu[:-1], rows)
    out: list[Tensor] = []
    for parts, dtype in (
        ((cu, local), np.int32),
        ((slots, counts, np.repeat(slots, rows), np.repeat(every, counts)), np.int64),
    ):
        sent = async_tensor_h2d(np.concatenate(parts).astype(dtype), device)
        out += sent.split([len(part) for part in parts])
    return tuple(out)


def install(runner: Any, settings: Settings, engine_index: int) -> CoSpecRejectionSampler:
    """Put arbitration into a loaded V1 runner on a GPU.

    Args:
        runner: vLLM's V1 GPUModelRunner, with drafter and sampler built.
        settings: of the server.
        engine_index: which of the server's engines this is, for the counters.

    Raises:
        CompatibilityError: something cospec cannot be combined with.
    """
    method = runner.speculative_config.rejection_sample_method
    if method != "standard":
        raise CompatibilityError(
            f"{WHERE}.rejection_sample_method: {method!r} cannot be combined with cospec; leave it out"
        )
    sampler = CoSpecRejectionSampler(runner, settings, counters_of_this_rank(settings, engine_index))
    draft_logits = sampler.recorder.logits
    if draft_logits is not None:
        logger.info("CoSpec keeps draft logits: %.2f GiB on the device.", draft_logits.nbytes / 2**30)
    runner.rejection_sampler = sampler
    return sampler
