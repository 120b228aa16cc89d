"""Which part of its response the request in each slot of a device is in: thinking, or the answer.

The markers are looked for in the tokens that were emitted, as they are verified; nothing waits for the device. A token
that was emitted in a step without verification stands in front of the next block and is looked at there. Of two such
steps in a row one token is missed: then the part is unknown, and verification strict, until the next marker.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vllm_cospec.config import Settings
from vllm_cospec.kernels.reach import ANSWERING, SCOPES, UNKNOWN, out_of_scope, part_after, parts


class Parts:
    """The part of each of S slots, and the scope its request asked for."""

    def __init__(self, size: int, settings: Settings, device: torch.device):
        self._markers = settings.thinking_tokens
        self._part = torch.zeros(size, dtype=torch.int64, device=device)
        self._known = torch.zeros(size, dtype=torch.int64, device=device)  # position of the last token looked at
        self._scope = torch.zeros(size, dtype=torch.int64, device=device)
        self._on_host = np.zeros(size, np.int64)  # the scopes
        self._step: tuple[Tensor, Tensor] | None = None

    def enter(self, slot: int, scope: str, num_prompt_tokens: int, tokens: list[int] | None) -> None:
        """Start a slot.

        Args:
            slot: which one.
            scope: that its request asked for.
            num_prompt_tokens: of it.
            tokens: of prompt and response as far as the host knows them, -1 where it does not; None for embeddings.
        """
        self._on_host[slot] = index = SCOPES.index(scope)
        if self._markers is None:
            return
        known = [] if tokens is None else tokens[: tokens.index(-1)] if -1 in tokens else tokens
        self._scope[slot].fill_(index)
        self._part[slot].fill_(part_after(ANSWERING, known, self._markers))
        self._known[slot].fill_(max(num_prompt_tokens, len(known)) - 1)

    def any(self, slots: np.ndarray) -> bool:
        """Return whether a request in these slots has a scope, [B]."""
        return self._markers is not None and bool(self._on_host[slots].any())

    def closed(
        self, slots: np.ndarray, before: Tensor, step: Tensor, position: Tensor, row_slot: Tensor
    ) -> Tensor | None:
        """Return which rows of a step are out of their requests' scopes, bool [R]; None where no request has one.

        Args:
            slots: of the requests, [B].
            before: [R] int, the input token of each row.
            step: [R] int, index of each row in its request.
            position: [R] int64, of the input tokens.
            row_slot: [R] int64.
        """
        self._step = None
        if self._markers is None or not self.any(slots):
            return None
        known, first = self._known[row_slot], position - step
        new = (step > 0) | (first > known)
        start = torch.where(first > known + 1, UNKNOWN, self._part[row_slot])
        part = parts(torch.where(new, before, -1), step, self._markers, start)
        self._step = part, position
        return out_of_scope(part, self._scope[row_slot])

    def follow(self, first: Tensor, request_slot: Tensor, num_kept: Tensor) -> None:
        """Take in what became of the step that :meth:`closed` has seen.

        Args:
            first: [B + 1] int, first row of each request.
            request_slot: [B] int64.
            num_kept: [B] int, drafts that were kept.
        """
        if self._step is None:
            return
        part, position = self._step
        last = first[:-1].long() + num_kept
        self._part[request_slot] = part[last]
        self._known[request_slot] = torch.maximum(self._known[request_slot], position[last])
