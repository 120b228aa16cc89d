"""What the drafter of Model Runner V1 proposed, kept on the device: tokens and raw logits by request slot.

A block stays in its slot until it is verified, in the next step or in a later one. What the drafts were drawn from is
computed again from their logits. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_cospec import compat
from vllm_cospec.config import Settings
from vllm_cospec.health import Reason
from vllm_cospec.hooks import PROPOSER, RUNNER
from vllm_cospec.runners.seeds import GREEDY_BELOW, SeededDrafts
from vllm_cospec.runners.slots import PlacedSlots
from vllm_cospec.runners.v1_drafter import V1Drafter

NOTHING_PROPOSED = -2  # no token, and not vLLM's placeholder either


class DeviceRecorder(V1Drafter):
    """Wraps the drafter of a V1 runner on a GPU."""

    def __init__(self, runner: Any, settings: Settings, table: PlacedSlots):
        self._seeded = SeededDeviceDrafts(runner) if hasattr(runner.drafter, "_sample_from_logits") else None
        super().__init__(runner, settings)
        size, k = table.size, settings.num_speculative_tokens
        self._table = table
        self._reasons: dict[int, Reason | None] = {}  # of each slot with a block; why it is not whole
        self._slots: Tensor | None = None  # [B] of the batch that is being drafted for
        self._slots_on_host = np.zeros(0, np.int64)
        self._whole: list[bool] = []
        self._step = 0
        self._drawn = False  # drafts of sampled requests are drawn, not chosen
        self.tokens = torch.full((size, k), NOTHING_PROPOSED, dtype=torch.int32, device=runner.device)
        self.outgrown = torch.zeros(size, dtype=torch.bool, device=runner.device)
        """[S], which blocks have drafts beyond the drafter's context."""
        self.logits: Tensor | None = None
        """[S, K, V]; None for drafters without logits, and where no policy looks at them and no draft is drawn."""
        # suffix decoding drafts from the responses to other requests, and forgets a request that waits
        self._of_others = Reason.DRAFT_COUNT if runner.speculative_config.method == "suffix" else None
        drawn = runner.speculative_config.draft_sample_method == "probabilistic"
        if settings.reads_draft_logits or (settings.draft_logits and drawn):
            config = runner.model_config
            self.logits = torch.full(
                (size, k, config.get_vocab_size()), -torch.inf, dtype=config.head_dtype, device=runner.device
            )
            # stock's knows the last step only, and gives up the whole batch for one request that waited
            compat.wrap(f"{RUNNER}._get_spec_decode_draft_probs", runner, lambda metadata: None)
            compat.wrap(f"{PROPOSER}._sample_draft_tokens", self._drafter, self.sample_draft_tokens)

    def update_states(self, scheduler_output: Any) -> Any:
        """As the runner's: preempted requests give up their slots."""
        for request_id in scheduler_output.preempted_req_ids or ():
            if request_id in self._runner.requests:
                self._table.leave(self._runner.requests[request_id])
        return super().update_states(scheduler_output)

    def place(self) -> np.ndarray:
        """Return the slot of every request of the runner's batch, int64 [B]."""
        slots, newcomers = self._table.place()
        for slot in newcomers:
            self._reasons.pop(slot, None)
        return slots

    def take(self, slots: Sequence[int]) -> list[tuple[bool, Reason | None]]:
        """Return of each slot whether it holds a block, and why it is not whole; a block can be taken once."""
        return [(slot in self._reasons, self._reasons.pop(slot, None)) for slot in slots]

    def begin(self, whole: list[bool]) -> None:
        """As the base's."""
        if getattr(self._runner, "use_async_scheduling", False):
            self._reasons.clear()  # drafts stay in the runner, which forgets those of requests that wait
        self._slots_on_host, self._whole, self._step = self.place(), whole, 0
        self._slots = async_tensor_h2d(self._slots_on_host, self._runner.device)

    def end(self, proposed: Any) -> None:
        """As the base's: [B, K] tokens on the device, or lists from drafters on the host."""
        slots, self._slots = self._slots, None
        assert slots is not None
        take_probabilities = getattr(self._drafter, "take_last_draft_probs", None)
        if take_probabilities is not None and self.logits is not None:
            take_probabilities()  # [B, K, V] that nobody will read
        tokens = proposed[0] if isinstance(proposed, tuple) else proposed  # ngram_gpu counts its drafts as well
        if isinstance(tokens, list):
            padded = np.full((len(tokens), self.tokens.shape[1]), NOTHING_PROPOSED, np.int32)
            for row, own in zip(padded, tokens, strict=True):
                row[: len(own)] = own
            tokens = async_tensor_h2d(padded, self._runner.device)
        if tokens.shape[1] < self.tokens.shape[1]:
            self.tokens[slots] = NOTHING_PROPOSED
        self.tokens[slots, : tokens.shape[1]] = tokens.to(torch.int32)
        self.outgrown[slots] = torch.zeros_like(slots, dtype=torch.bool) if self._outgrown is None else self._outgrown
        for slot, whole in zip(self._slots_on_host.tolist(), self._whole, strict=True):
            self._reasons[slot] = self._of_others if whole else Reason.CACHE

    def withdraw(self, request_id: str, reason: Reason) -> None:
        """As the base's."""
        slot = self._table.slot_of(self._runner.requests[request_id])
        if slot is not None:
            self._reasons[slot] = reason

    def sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """As the stock ``_sample_draft_tokens``: [B, H] -> (tokens [B], probabilities [B, V] or None)."""
        logits = self._drafter.model.compute_logits(hidden_states)
        if self._slots is not None and self.logits is not None:
            # sampling divides by the temperature in place; this is a copy
            width = min(logits.shape[1], self.logits.shape[2])
            self.logits[self._slots, self._step, :width] = logits[:, :width].to(self.logits.dtype)
            self._step += 1
        tokens, probabilities = self._drafter._sample_from_logits(logits, sampling_metadata)
        self._drawn |= probabilities is not None
        return tokens, probabilities

    def probabilities(self, slots: Tensor, steps: Tensor, temperature: Tensor) -> Tensor | None:
        """Return what drafts of sampled requests were drawn from.

        Args:
            slots, steps: int64 [N], where each draft lies.
            temperature: [N] of its request; greedy ones may have any.

        Returns:
            float32 [N, V], None where drafts are not drawn.
        """
        if self.logits is None or not self._drawn:
            return None
        # in the type of the logits, as stock
        logits = self.logits[slots, steps].div_(torch.where(temperature < GREEDY_BELOW, 1.0, temperature).unsqueeze(1))
        return logits.softmax(dim=-1, dtype=torch.float32)

    def warm_up(self) -> None:
        """Compile what drafting launches beside the model."""
        if self._seeded is not None and self.logits is not None:
            row = torch.zeros(1, self.logits.shape[2], device=self._runner.device)
            seeded_choice(row, *torch.zeros(2, 1, dtype=torch.int64, device=self._runner.device))


class SeededDeviceDrafts(SeededDrafts):
    """As the base, with the counter-based random numbers of Model Runner V2, which the device draws by itself."""

    def draw_again(self, tokens: Tensor, probabilities: Tensor, seeds: dict[int, int], positions: Tensor) -> Tensor:
        """As the base's."""
        every = np.zeros(len(tokens), np.int64)
        every[list(seeds)] = list(seeds.values())
        seeded = np.zeros(len(tokens), bool)
        seeded[list(seeds)] = True
        device = tokens.device
        drawn = seeded_choice(probabilities.log(), async_tensor_h2d(every, device), positions.long())
        return torch.where(async_tensor_h2d(seeded, device), drawn.to(tokens.dtype), tokens)


def seeded_choice(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw a token from each row, int64 [B]: a function of its seed and position.

    Args:
        logits: float32 [B, V].
        seeds, positions: int64 [B].
    """
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    rows = torch.arange(len(logits), device=logits.device)
    temperature = torch.ones(len(logits), device=logits.device)
    return gumbel_sample(logits, rows, temperature, seeds, positions, apply_temperature=False, is_drafting=True)
