"""Random numbers that are a function of a request's seed and a place in its text, and of nothing else.

vLLM's V1 verifies a seeded request with the request's own generator, but draws its drafts from the global one: the
same request gives another text every time. Here the drafts of seeded requests are drawn again.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import sample_with_exponential_noise

from vllm_cospec import compat
from vllm_cospec.hooks import PROPOSER, RUNNER

GREEDY_BELOW = 1e-5  # temperature; vLLM's _SAMPLING_EPS


def hashed(purpose: str, seed: int, position: int) -> int:
    """Return 64 bits that look random; numbers for different purposes have nothing in common."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def exponential_noise(rows: Tensor, seeds: list[int], positions: list[int]) -> Tensor:
    """Return exponential noise like ``rows``, float [M, V]; each row a function of its seed and position."""
    noise = torch.empty_like(rows)
    generator = torch.Generator()
    for row, seed, position in zip(noise, seeds, positions, strict=True):
        row.exponential_(generator=generator.manual_seed(hashed("draft", seed, position) >> 1))
    return noise


class SeededDrafts:
    """Wraps a V1 drafter: seeded requests draw their drafts by (seed, position). On the CPU.

    Every draft is drawn by stock first, so that unseeded requests get what stock gives them.
    """

    def __init__(self, runner: Any):
        self._runner = runner
        drafter = runner.drafter
        self._positions: Tensor | None = None  # int [B], of the draft that is drawn next
        self._seeds: dict[int, int] = {}  # by row
        self._propose = compat.wrap(f"{PROPOSER}.propose", drafter, self.propose)
        self._sample_from_logits = compat.wrap(f"{PROPOSER}._sample_from_logits", drafter, self.sample_from_logits)

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """As the drafter's."""
        known = kwargs["common_attn_metadata"].seq_lens
        rejected = kwargs.get("num_rejected_tokens_gpu")
        # the tokens the target has computed, and the one it has just sampled
        self._positions = known + 1 if rejected is None else known - rejected + 1
        requests = [self._runner.requests[request_id] for request_id in self._runner.input_batch.req_ids]
        seeds = [getattr(request.sampling_params, "seed", None) for request in requests]
        self._seeds = {row: seed for row, seed in enumerate(seeds) if seed is not None}
        try:
            return self._propose(*args, **kwargs)
        finally:
            self._positions = None

    def sample_from_logits(self, logits: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """As the drafter's: [B, V], overwritten -> (tokens [B], probabilities [B, V] or None)."""
        if sampling_metadata.all_greedy or self._positions is None:
            return self._sample_from_logits(logits, sampling_metadata)
        # dividing by a temperature may round two logits to one
        first_choice = None if sampling_metadata.all_random else logits.argmax(dim=-1)
        tokens, probabilities = self._sample_from_logits(logits, sampling_metadata)
        if probabilities is None:  # drafts are not drawn
            return tokens, probabilities
        if self._seeds:
            tokens = self.draw_again(tokens, probabilities, self._seeds, self._positions)
        if first_choice is not None:
            tokens = torch.where(sampling_metadata.temperature < GREEDY_BELOW, first_choice, tokens)
        self._positions = self._positions + 1
        return tokens, probabilities

    def draw_again(self, tokens: Tensor, probabilities: Tensor, seeds: dict[int, int], positions: Tensor) -> Tensor:
        """Return the tokens [B] with those of seeded requests drawn by seed and position.

        Args:
            tokens: [B], may be overwritten.
            probabilities: float32 [B, V].
            seeds: by row.
            positions: int [B].
        """
        rows = list(seeds)
        drawn = probabilities[rows]
        tokens[rows] = sample_with_exponential_noise(
            drawn, exponential_noise(drawn, list(seeds.values()), positions[rows].tolist())
        )
        return tokens


class ThrownAwayDraws:
    """Spares the generators of requests whose sample a step throws away: all but the last chunk of a prompt.

    How a prompt is cut into chunks depends on what else is being served. Stock takes such a draw back by moving the
    generator's offset, which generators on the CPU do not have: there it ends the engine.
    """

    def __init__(self, runner: Any):
        self._runner = runner
        self._hidden: dict[int, torch.Generator] = {}
        self._update_states = compat.wrap(f"{RUNNER}._update_states", runner, self.update_states)

    def hide(self) -> None:
        """Take them out of the runner's batch until the next step; call it before anything is drawn."""
        batch = self._runner.input_batch
        if batch.generators:
            for index in self._runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
                if index in batch.generators:
                    self._hidden[index] = batch.generators.pop(index)

    def update_states(self, scheduler_output: Any) -> Any:
        """As the runner's, which moves requests about in the batch: first everything is put back."""
        self._runner.input_batch.generators.update(self._hidden)
        self._hidden.clear()
        return self._update_states(scheduler_output)
