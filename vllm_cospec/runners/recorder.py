"""What the drafter proposed, kept until it is verified: token ids, raw logits and probabilities per request.

A block may be verified later than those proposed beside it, when the token budget of a step ends before it. So blocks
are kept per request: as rows of the step that proposed them, and on their own once another step has proposed. There is
at most one for each request that vLLM runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vllm_cospec import compat
from vllm_cospec.config import Settings
from vllm_cospec.health import Reason
from vllm_cospec.hooks import PROPOSER, RUNNER
from vllm_cospec.runners.seeds import SeededDrafts
from vllm_cospec.runners.v1_drafter import V1Drafter


@dataclass
class Proposals:
    """The drafts of one step, or of one request."""

    tokens: Sequence[Sequence[int]] = field(default_factory=list)  # [R, K], or ragged from ngram and suffix
    logits: list[Tensor] = field(default_factory=list)  # K tensors [R, V]; empty without draft logits
    probabilities: Tensor | None = None  # [R, K, V]; None where drafts were not drawn


@dataclass
class ProposedBlock:
    """What was proposed for one request."""

    proposals: Proposals
    row: int
    reason: Reason | None = None  # why it is not whole

    @property
    def tokens(self) -> Sequence[int]:
        """The drafts, K or fewer."""
        return self.proposals.tokens[self.row]

    def logits(self, position: int) -> Tensor:
        """Return the draft logits at a position, [V]."""
        return self.proposals.logits[position][self.row]

    def probabilities(self, num_drafts: int) -> Tensor | None:
        """Return what the first drafts were drawn from, [num_drafts, V]."""
        every = self.proposals.probabilities
        return None if every is None else every[self.row, :num_drafts]

    def detach(self) -> None:
        """Let go of the rows of the other requests."""
        one = slice(self.row, self.row + 1)
        every = self.proposals.probabilities
        self.proposals = Proposals(
            [self.tokens],
            [logits[one].clone() for logits in self.proposals.logits],
            None if every is None else every[one].clone(),
        )
        self.row = 0


class Recorder(V1Drafter):
    """Wraps the drafter of a V1 runner on the CPU."""

    def __init__(self, runner: Any, settings: Settings):
        if hasattr(runner.drafter, "_sample_from_logits"):
            SeededDrafts(runner)
        super().__init__(runner, settings)
        self._blocks: dict[str, ProposedBlock] = {}
        self._current: Proposals | None = None
        self._whole: list[bool] = []
        # suffix decoding drafts from the responses to other requests, and forgets a request that waits
        self._of_others = Reason.DRAFT_COUNT if runner.speculative_config.method == "suffix" else None
        # stock's knows the last step only, and gives up the whole batch for one request that waited
        compat.wrap(f"{RUNNER}._get_spec_decode_draft_probs", runner, lambda metadata: None)
        if settings.draft_logits:
            compat.wrap(f"{PROPOSER}._sample_draft_tokens", self._drafter, self.sample_draft_tokens)

    def take(self, request_ids: Sequence[str]) -> list[ProposedBlock | None]:
        """Return what was proposed for each of these requests, and forget it."""
        return [self._blocks.pop(request_id, None) for request_id in request_ids]

    def begin(self, whole: list[bool]) -> None:
        """Open the record of a step."""
        for request_id in list(self._blocks):
            if request_id not in self._runner.requests:
                del self._blocks[request_id]
        for block in self._blocks.values():
            block.detach()
        self._current, self._whole = Proposals(), whole

    def end(self, proposed: Any) -> None:
        """Close it."""
        current, self._current = self._current, None
        assert current is not None
        current.tokens = proposed.tolist() if isinstance(proposed, Tensor) else proposed
        take_probabilities = getattr(self._drafter, "take_last_draft_probs", None)
        if take_probabilities is not None:
            current.probabilities = take_probabilities()
        for row, request_id in enumerate(self._runner.input_batch.req_ids):
            self._blocks[request_id] = ProposedBlock(
                current, row, self._of_others if self._whole[row] else Reason.CACHE
            )

    def withdraw(self, request_id: str, reason: Reason) -> None:
        """As the base's."""
        self._blocks[request_id] = ProposedBlock(Proposals([[]]), 0, reason)

    def sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """As the stock ``_sample_draft_tokens``: [R, H] -> (tokens [R], probabilities [R, V] or None)."""
        logits = self._drafter.model.compute_logits(hidden_states)
        if self._current is not None:
            # sampling divides by the temperature in place; argmax leaves the logits alone
            self._current.logits.append(logits if sampling_metadata.all_greedy else logits.clone())
        return self._drafter._sample_from_logits(logits, sampling_metadata)


def draft_probabilities(
    blocks: Sequence[ProposedBlock | None], num_draft_tokens: Sequence[int], draft_tokens: Tensor
) -> Tensor | None:
    """Return what the N drafts of a batch were drawn from, float32 [N, V]; None where none of them was drawn.

    A draft that was not drawn, as a greedy request's, had all the probability.
    """
    rows = [
        None if block is None else block.probabilities(n)
        for block, n in zip(blocks, num_draft_tokens, strict=True)
        if n
    ]
    drawn = next((row for row in rows if row is not None), None)
    if drawn is None:
        return None
    parts = draft_tokens.long().clamp(min=0).split([n for n in num_draft_tokens if n])
    return torch.cat(
        [
            one_hot(tokens, drawn.shape[1]).to(drawn.dtype) if row is None else row
            for tokens, row in zip(parts, rows, strict=True)
        ]
    )
