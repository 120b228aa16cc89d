"""Model Runner V1 on a GPU: the blocks are scanned by the fused Triton path.

What leads there is :mod:`vllm_cospec.runners.v1`'s: stock's own functions have processed the logits and drawn what
there is to draw. The rows of logits lie as on V2: those of a request one after the other, its bonus row last. Nothing
here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_cospec.config import WHERE, Settings
from vllm_cospec.errors import CompatibilityError
from vllm_cospec.health import REASONS, Reason
from vllm_cospec.kernels.triton.launch import ServerShapes, arbitrate_given, exceeds_32_bits, warm_up
from vllm_cospec.kernels.triton.step import Rows, Verdict
from vllm_cospec.metrics import Counters, counters_of_this_rank
from vllm_cospec.reports import StepCounts
from vllm_cospec.runners.device import DeviceCounters, DevicePolicy, TracedStep, announce_draft_logits
from vllm_cospec.runners.device_recorder import DeviceRecorder
from vllm_cospec.runners.slots import PlacedSlots
from vllm_cospec.runners.v1 import V1Sampler, V1Step


@dataclass(frozen=True)
class Layout:
    """Where the rows and drafts of a step lie: B requests, R rows, N drafts; typed as Model Runner V2 types them."""

    first: Tensor  # int32 [B + 1], first row of each request
    local: Tensor  # int32 [R], index of each row in its request
    request_slot: Tensor  # int64 [B]
    num_drafts: Tensor  # int64 [B]
    row_slot: Tensor  # int64 [R]
    request: Tensor  # int64 [N], of each draft
    draft_slot: Tensor  # int64 [N]
    draft_step: Tensor  # int64 [N], index in its block


class V1GPUSampler(DevicePolicy, V1Sampler):
    """Verifies drafts on the device with a policy at the mismatches."""

    recorder: DeviceRecorder

    def __init__(self, runner: Any, settings: Settings, counters: Counters | None):
        super().__init__(runner)
        self._table = PlacedSlots(runner, settings)
        self.recorder = DeviceRecorder(runner, settings, self._table)
        self._counters = DeviceCounters(counters, settings.num_speculative_tokens, runner.device)
        self._slots = np.zeros(0, np.int64)  # of the requests of the running step
        self._taken: list[tuple[bool, Reason | None]] = []
        self._known: tuple[Layout, Tensor] | None = None  # of the running step, see _find_lost
        self.load_policy(settings, runner.device, keeps_draft_logits=self.recorder.logits is not None)
        size, vocab_size = self._table.size, runner.model_config.get_vocab_size()
        num_rows = size * (settings.num_speculative_tokens + 1)
        self.load_memory(self._counters.on_device, vocab_size, num_rows, size, use_fp64=False)

    def open_step(self, request_ids: Sequence[str]) -> None:
        """As the base's."""
        self._slots, self._known = self.recorder.place(), None
        self._taken = self.recorder.take(self._slots.tolist())

    def find_probabilities(
        self, metadata: SpecDecodeMetadata, given: Tensor | None, sampling_metadata: Any
    ) -> Tensor | None:
        """As the base's."""
        if sampling_metadata.all_greedy or not len(metadata.draft_token_ids):
            return given
        layout, lost = self._find_lost(metadata)
        temperature = sampling_metadata.temperature[layout.request]
        own = self.recorder.probabilities(layout.draft_slot, layout.draft_step, temperature)
        if own is None:
            return given
        # What was not drawn had all the probability.
        index = metadata.draft_token_ids.long().clamp(0, own.shape[1] - 1).unsqueeze(1)
        drawn = own.gather(1, index)
        own.masked_fill_(lost.unsqueeze(1), 0.0)
        return own.scatter_(1, index, drawn.masked_fill_(lost.unsqueeze(1), 1.0))

    def find_wanted(self) -> np.ndarray:
        """As the base's."""
        return self._table.arbitrated(self._slots)

    def find_reasons(self, metadata: SpecDecodeMetadata) -> list[Reason | None]:
        """As the base's; drafts that are not the recorded ones are found on the device."""
        return [
            reason if present or not n else Reason.SKIPPED
            for (present, reason), n in zip(self._taken, metadata.num_draft_tokens, strict=True)
        ]

    def count_unhealthy(self, positions: np.ndarray) -> None:
        """As the base's."""
        self._counters.unhealthy += async_tensor_h2d(positions, self._device)
        self._counters.export()

    def scan(self, step: V1Step) -> Tensor:
        """As the base's."""
        metadata, bonus = step.metadata, step.bonus_tokens.view(-1, 1).to(torch.int32)
        column = torch.arange(metadata.max_spec_len + 1, device=bonus.device)
        if not len(metadata.draft_token_ids):
            output = torch.where(column == 0, bonus, PLACEHOLDER_TOKEN_ID)
            self.follow_stock(metadata, output)
            return output
        layout, lost = self._find_lost(metadata)
        table, seed = self._table.on_device(self._slots[self._notes.left_out])
        outgrown = self.recorder.outgrown[layout.draft_slot]
        drafts = metadata.draft_token_ids.to(torch.int32)
        drafted = torch.full((len(step.logits),), PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=drafts.device)
        drafted[metadata.target_logits_indices + 1] = drafts
        position = self._runner.positions[metadata.logits_indices]
        strict = self.strict_verdict(step)
        closed, legal = self._closed(metadata, layout, position), step.legal
        if closed is not None:
            legal = legal & ~closed[metadata.target_logits_indices]
        verdict = Verdict(
            torch.where(lost | outgrown, PLACEHOLDER_TOKEN_ID, drafts), layout.request, strict.accepted,
            strict.target_tokens, legal, seed, strict.acceptance_ratio, strict.uniform,
        )  # fmt: skip
        rows = Rows(
            raw=step.logits, processed=step.logits, draft=self.recorder.logits, drafted=drafted, first=layout.first,
            position=position, request_slot=layout.request_slot, slot=layout.row_slot, step=layout.local,
            num_steps=self._settings.num_speculative_tokens,
        )  # fmt: skip
        arbitrated = table.arbitrated[layout.draft_slot] != 0
        self._counters.unhealthy[REASONS.index(Reason.CONTEXT)] += (arbitrated & outgrown).sum()
        self._counters.unhealthy[REASONS.index(Reason.LOST)] += (arbitrated & lost & ~outgrown).sum()
        result = arbitrate_given(rows, verdict, table, self.program, self._memory)
        self._table.parts.follow(layout.first, layout.request_slot, result.num_kept)
        self._counters.export()
        if result.trace is not None:
            names = dict(zip(self._slots.tolist(), self._runner.input_batch.req_ids, strict=True))
            output_position = position + 1 - table.response_start[layout.row_slot]
            self._steps.append(TracedStep(names, layout.row_slot, layout.local, output_position, result.trace))

        kept, num_drafts = result.num_kept.unsqueeze(1), layout.num_drafts.unsqueeze(1)
        stopped = result.tokens[:, : len(column)].to(torch.int32)
        output = torch.where((column < kept) | ((column == kept) & (kept < num_drafts)), stopped, PLACEHOLDER_TOKEN_ID)
        return torch.where((column == kept) & (kept == num_drafts), bonus, output)

    def follow_stock(self, metadata: SpecDecodeMetadata, tokens: Tensor) -> None:
        """As the base's."""
        if not self._table.parts.any(self._slots):
            return
        layout, _ = self._find_lost(metadata)
        self._closed(metadata, layout, self._runner.positions[metadata.logits_indices])
        num_kept = (tokens != PLACEHOLDER_TOKEN_ID).sum(1) - 1
        self._table.parts.follow(layout.first, layout.request_slot, num_kept)

    def _closed(self, metadata: SpecDecodeMetadata, layout: Layout, position: Tensor) -> Tensor | None:
        """Return which rows are out of scope, bool [R], None where no request has one."""
        parts = self._table.parts
        if not parts.any(self._slots):
            return None
        before = self._runner.input_ids.gpu[metadata.logits_indices]
        return parts.closed(self._slots, before, layout.local, position, layout.row_slot)

    def _find_lost(self, metadata: SpecDecodeMetadata) -> tuple[Layout, Tensor]:
        """Return where everything lies, and which drafts are of a block that is not the recorded one, bool [N]."""
        if self._known is None:
            counts = np.array(metadata.num_draft_tokens, np.int64)
            layout = _lay_out(counts, self._slots, self._device)
            recorded = self.recorder.tokens[layout.draft_slot, layout.draft_step]
            differing = torch.zeros_like(layout.num_drafts).index_add_(
                0, layout.request, (recorded != metadata.draft_token_ids).to(torch.int64)
            )
            absent = [not present for present, _ in self._taken]
            differing += async_tensor_h2d(np.array(absent, np.int64), self._device)
            self._known = layout, differing[layout.request] != 0
        return self._known

    def request_counts(self) -> Callable[[], StepCounts]:
        """As the contract's."""
        return self._table.counts()

    def warm_up(self) -> None:
        """Compile every kernel these settings can launch."""
        config, k = self._runner.model_config, self._settings.num_speculative_tokens
        vocab_size, num_rows = config.get_vocab_size(), self._table.size * (k + 1)
        server = ServerShapes(
            vocab_size, config.head_dtype, self.recorder.logits, k, self._runner.device,
            given_verdict=True, counts_scores=self._settings.counts_scores,
            large_logits=exceeds_32_bits(num_rows, vocab_size, config.head_dtype),
        )  # fmt: skip
        warm_up(server, self.program)
        self.recorder.warm_up()


def _lay_out(counts: np.ndarray, slots: np.ndarray, device: torch.device) -> Layout:
    """Lay out B requests with these numbers of drafts."""
    rows, every = counts + 1, np.arange(len(counts))
    first = np.concatenate([[0], np.cumsum(rows)])
    local = np.arange(first[-1]) - np.repeat(first[:-1], rows)
    request = np.repeat(every, counts)
    step = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    sent: list[Tensor] = []
    for parts, dtype in (
        ((first, local), np.int32),
        ((slots, counts, np.repeat(slots, rows), request, np.repeat(slots, counts), step), np.int64),
    ):
        whole = async_tensor_h2d(np.concatenate(parts).astype(dtype), device)
        sent += whole.split([len(part) for part in parts])
    return Layout(*sent)


def install(runner: Any, settings: Settings, engine_index: int) -> V1GPUSampler:
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
    if runner.speculative_config.parallel_drafting:
        raise CompatibilityError(
            f"{WHERE}.draft_method: {runner.speculative_config.method!r} drafts in parallel, and vLLM has chosen Model "
            f"Runner V1, where cospec does not follow what such a drafter's cache holds; use another drafter"
        )
    sampler = V1GPUSampler(runner, settings, counters_of_this_rank(settings, engine_index))
    announce_draft_logits(sampler.recorder.logits, settings)
    runner.rejection_sampler = sampler
    return sampler
