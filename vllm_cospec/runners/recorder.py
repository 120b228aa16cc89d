"""What the drafter proposed, kept until it is verified: token ids and raw logits per request.

The stock drafters are reused as they are; their ``propose`` and ``_sample_draft_tokens`` are wrapped on the instance.
A draft that is not found here again at verification is junk: vLLM fills in zeros for a batch the drafter has no room
for, and a request may be verified a step later than its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_cospec import compat


@dataclass
class Proposals:
    """The drafts of one step."""

    request_ids: list[str]
    tokens: Tensor | Sequence[Sequence[int]] = field(default_factory=list)  # [R, K], or ragged from ngram and suffix
    logits: list[Tensor] = field(default_factory=list)  # K tensors [R, V]; empty without draft logits

    def rows_of(self, request_ids: Sequence[str]) -> np.ndarray:
        """Return the row of each request, int64, -1 where it proposed nothing in this step."""
        index = {request_id: row for row, request_id in enumerate(self.request_ids)}
        return np.array([index.get(request_id, -1) for request_id in request_ids], np.int64)

    def proposed(self, row: int, drafts: np.ndarray) -> bool:
        """Return whether ``drafts`` is the beginning of what row ``row`` proposed."""
        tokens = np.asarray(self.tokens[row])
        return len(drafts) <= len(tokens) and bool((tokens[: len(drafts)] == drafts).all())

    def gather_logits(self, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Return the draft logits of M (row, position) pairs, [M, V]."""
        return torch.stack([self.logits[position][row] for row, position in zip(rows, positions, strict=True)])


class ProposalRecorder:
    """Wraps a drafter; :meth:`take` hands out the proposals of the last step, once."""

    def __init__(self, runner: Any, draft_logits: bool):
        self._runner = runner
        self._drafter = drafter = runner.drafter
        self._current: Proposals | None = None
        self._propose = compat.wrap(f"{compat.PROPOSER}.propose", drafter, self._record)
        if draft_logits:
            compat.wrap(f"{compat.PROPOSER}._sample_draft_tokens", drafter, self._sample_and_keep)

    def take(self) -> Proposals | None:
        """Return the last proposals and forget them."""
        current, self._current = self._current, None
        return current

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        self._current = Proposals(list(self._runner.input_batch.req_ids))
        tokens = self._propose(*args, **kwargs)
        self._current.tokens = tokens
        return tokens

    def _sample_and_keep(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """As the stock ``_sample_draft_tokens``: [R, H] -> (tokens [R], probabilities [R, V] or None)."""
        logits = self._drafter.model.compute_logits(hidden_states)
        if self._current is not None:
            # sampling divides by the temperature in place; argmax leaves the logits alone
            self._current.logits.append(logits if sampling_metadata.all_greedy else logits.clone())
        return self._drafter._sample_from_logits(logits, sampling_metadata)
