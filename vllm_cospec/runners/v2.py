"""Model Runner V2: a rejection sampler whose verification is the fused Triton path.

Chunks in which no request is arbitrated go to stock verification untouched. Everything else stays stock as well: which
rows are verified, the processing of logits, logprobs, the grammar's invalid drafts. Nothing here waits for the device.
Legality needs no care of ours: on V2 vLLM's top-k and top-p leave the rows of requests that set neither as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, get_max_chunk_logits

from vllm_cospec import compat
from vllm_cospec.config import WHERE, Settings
from vllm_cospec.errors import CompatibilityError
from vllm_cospec.kernels.triton.launch import ServerShapes, arbitrate, exceeds_32_bits, warm_up
from vllm_cospec.kernels.triton.step import Rows, Sampling
from vllm_cospec.metrics import Counters, counters_of_this_rank
from vllm_cospec.reports import StepCounts
from vllm_cospec.runners.device import DeviceCounters, DevicePolicy, TracedStep, announce_draft_logits
from vllm_cospec.runners.slots import StagedSlots
from vllm_cospec.runners.v2_drafter import Arbitrated, DraftHealth, NgramMatches, ResumedRequests, protect


class V2Sampler(DevicePolicy, RejectionSampler):
    """Verifies drafts on the device with a policy at the mismatches."""

    def __init__(self, runner: Any, settings: Settings, counters: Counters | None):
        super().__init__(runner.sampler, runner.speculative_config, runner.device)
        self._runner = runner
        self._slots = StagedSlots(runner, settings)
        self._resumed = ResumedRequests(runner)
        self._counters = DeviceCounters(counters, settings.num_speculative_tokens, runner.device)
        self._health = DraftHealth(runner, settings, self._counters)
        self.strict = False
        """Whether every request is verified strictly."""
        slots = torch.zeros(runner.max_num_reqs, dtype=torch.int32, device=runner.device)
        self._nobody = Arbitrated(np.zeros(runner.max_num_reqs, np.int32), slots)
        speculator = runner.speculator
        protect(speculator, self._health.context, runner.max_model_len)
        self._matches = NgramMatches(speculator) if isinstance(speculator, NgramGPUSpeculator) else None
        add = "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request"
        self._add_request = compat.wrap(add, runner.model_state, self.add_request)
        staged = "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_staged_writes"
        self._apply_staged_writes = compat.wrap(staged, runner.sampler, self.apply_staged_writes)
        finish = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests"
        self._finish_requests = compat.wrap(finish, runner, self.finish_requests)
        self.load_policy(settings, runner.device, keeps_draft_logits=speculator.draft_logits is not None)
        block = settings.num_speculative_tokens + 1
        num_rows = min(runner.max_num_reqs * block, max(get_max_chunk_logits(runner.vocab_size), block))
        self.load_memory(
            self._counters.on_device, runner.vocab_size, num_rows, runner.max_num_reqs, self.sampler.use_fp64_gumbel
        )

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """As the model state's, which this wraps."""
        self._add_request(req_index, new_req_data)
        for table in (self._slots, self._health, self._resumed):
            table.add_request(req_index, new_req_data)

    def apply_staged_writes(self) -> None:
        """As the stock sampler's, which this wraps."""
        self._apply_staged_writes()
        self._slots.apply_staged_writes()

    def finish_requests(self, scheduler_output: Any) -> None:
        """As the runner's, which this wraps."""
        self._slots.finish_requests(scheduler_output)
        self._finish_requests(scheduler_output)
        self._resumed.finish_requests(scheduler_output)

    def __call__(
        self,
        logits: Tensor,
        input_batch: Any,
        draft_logits: Tensor | None = None,
        invalid_drafts: Tensor | None = None,
    ) -> Any:
        """Verify one step; arguments and result are those of the stock sampler."""
        if self.strict:
            self._arbitrated = self._nobody
            return super().__call__(logits, input_batch, draft_logits, invalid_drafts)
        self._arbitrated = self._health.arbitrated(input_batch, self._slots.arbitrated)
        if self._matches is not None and self._arbitrated.on_host[input_batch.idx_mapping_np].any():
            absent = self._matches.absent(input_batch, self._arbitrated.on_device)
            invalid_drafts = absent if invalid_drafts is None else invalid_drafts | absent
        return super().__call__(logits, input_batch, draft_logits, invalid_drafts)

    def _verify(
        self,
        logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Verify one chunk; arguments and result are those of the stock sampler."""
        parts = self._slots.parts
        closed = parts.closed(idx_mapping_np, draft_sampled, expanded_local_pos, pos, expanded_idx_mapping)
        if not self._arbitrated.on_host[idx_mapping_np].any():
            stock = super()._verify(
                logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np,
                expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled,
            )  # fmt: skip
            parts.follow(cu_num_logits, idx_mapping, stock[2] - 1)
            return stock
        processed = self.sampler.apply_sampling_params(
            logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled, expanded_local_pos,
            seq_lens_upper_bound_np,
        )  # fmt: skip
        states = self.sampler.sampling_states
        slots = self._slots.on_device(self._arbitrated.on_device)
        rows = Rows(
            raw=logits, processed=processed, draft=draft_logits, drafted=verify_draft_sampled, first=cu_num_logits,
            position=pos, request_slot=idx_mapping, slot=expanded_idx_mapping, step=expanded_local_pos,
            num_steps=self.num_speculative_steps, closed=closed,
        )  # fmt: skip
        sampling = Sampling(states.temperature.gpu, states.seeds.gpu, self.sampler.use_fp64_gumbel)
        verified = arbitrate(rows, sampling, slots, self.program, self._memory)
        parts.follow(cu_num_logits, idx_mapping, verified.num_sampled - 1)
        self._counters.export()
        if verified.trace is not None:
            names = self._runner.req_states.index_to_req_id
            output_position = pos + 1 - slots.response_start[expanded_idx_mapping]
            self._steps.append(
                TracedStep(
                    {int(slot): names.get(int(slot), "") for slot in idx_mapping_np},
                    expanded_idx_mapping, expanded_local_pos, output_position, verified.trace,
                )
            )  # fmt: skip
        return processed, verified.sampled, verified.num_sampled

    def request_counts(self) -> Callable[[], StepCounts]:
        """As the contract's."""
        return self._slots.counts()

    def warm_up(self) -> None:
        """Compile every kernel these settings can launch."""
        runner = self._runner
        dtype = runner.vllm_config.model_config.head_dtype
        num_rows = runner.max_num_reqs * (self.num_speculative_steps + 1)
        server = ServerShapes(
            runner.vocab_size, dtype, runner.speculator.draft_logits, self.num_speculative_steps, runner.device,
            use_fp64=self.sampler.use_fp64_gumbel, counts_scores=self._settings.counts_scores,
            large_logits=exceeds_32_bits(num_rows, runner.vocab_size, dtype),
        )  # fmt: skip
        warm_up(server, self.program)


def check(runner: Any, settings: Settings) -> None:
    """Refuse what arbitration cannot be combined with on V2.

    Raises:
        CompatibilityError: one sentence that names the setting and the way out.
    """
    sampler, config = runner.rejection_sampler, runner.speculative_config
    if type(sampler) is not RejectionSampler:
        raise CompatibilityError(
            f"{type(sampler).__name__}: this model brings its own verification, which cospec would replace; "
            f"serve it without cospec"
        )
    if sampler.enable_adaptive_verification:
        raise CompatibilityError(
            f"{WHERE}.enable_adaptive_verification: True cannot be combined with cospec; leave it out"
        )
    if sampler.watermark_key is not None:
        raise CompatibilityError("watermark_config: cannot be combined with cospec; leave it out")
    if sampler.use_block_verification or sampler.synthetic_conditional_rates is not None:
        raise CompatibilityError(
            f"{WHERE}.rejection_sample_method: {config.rejection_sample_method!r} cannot be combined with cospec; "
            f"leave it out"
        )
    if runner.batch_sharder is not None:
        raise CompatibilityError("batch-sharded sampling: cannot be combined with cospec; switch it off")
    if settings.reads_draft_logits and runner.speculator.draft_logits is None:
        reader = "collect" if settings.collect else f"policy {settings.policy.policy!r}"
        raise CompatibilityError(
            f"{WHERE}.draft_sample_method: {config.draft_sample_method!r} keeps no draft logits, which {reader} "
            f"reads; leave it out, or pass 'probabilistic'"
        )


def install(runner: Any, settings: Settings, engine_index: int) -> V2Sampler:
    """Put arbitration into a loaded V2 runner.

    Args:
        runner: vLLM's V2 GPUModelRunner or a subclass, with speculator and sampler built.
        settings: of the server.
        engine_index: which of the server's engines this is, for the counters.

    Raises:
        CompatibilityError: something cospec cannot be combined with.
    """
    check(runner, settings)
    counters = counters_of_this_rank(settings, engine_index)
    announce_draft_logits(runner.speculator.draft_logits, settings)
    runner.rejection_sampler = V2Sampler(runner, settings, counters)
    return runner.rejection_sampler
