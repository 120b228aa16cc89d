"""How far a drafter has followed: what it has seen of each request, and of each block of the KV cache.

Draft and target share block tables. A block that the target filled while the drafter stood still has a hole for the
drafter, in whichever request it turns up again, and what the drafter computes behind a hole is a hole too. So nothing
here enumerates the ways in which vLLM skips a drafter: a token counts as seen when the drafter was run on it in the
step that computed it, with everything before it seen.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NULL_BLOCK = 0  # vLLM's: stands where a sliding window has passed, and is never read


class Span(NamedTuple):
    """The tokens of one request that a step computes."""

    request_id: str
    blocks: Sequence[int]  # of the drafter's KV cache, from the request's first token on
    start: int
    end: int  # may count drafts that turn out rejected: the next span then starts before it


class DraftCache:
    """Call :meth:`computed` at every step of the target and :meth:`drafted` at every step of the drafter."""

    def __init__(self, num_blocks: int, block_size: int):
        self._block_size = block_size
        self._slots = array("i", bytes(4 * num_blocks))  # of each block, how many of its first the drafter has filled
        self._seen: dict[str, int] = {}  # of each request, how many of its first tokens
        self._entered: dict[str, int] = {}  # admitted with so many tokens computed, and not looked at yet
        self._step: Sequence[Span] = ()  # computed by the target and not yet by the drafter

    def enter(self, request_id: str, num_computed: int) -> None:
        """Note a request that is new, or comes back, with its first tokens in the cache already; -1: out of reach."""
        self._entered[request_id] = num_computed

    def reset(self, blocks: Iterable[int]) -> None:
        """Note blocks that were filled from elsewhere."""
        for block in blocks:
            self._slots[block] = 0

    def copy(self, source: int, destination: int) -> None:
        """Note that a block was copied."""
        self._slots[destination] = self._slots[source]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Forget requests; their blocks stay."""
        for request_id in request_ids:
            self._seen.pop(request_id, None)
            self._entered.pop(request_id, None)

    def computed(self, spans: Sequence[Span]) -> None:
        """Note what the target computes in a step; in the order of the batch."""
        for span in self._step:  # the drafter stood still
            self._unsee(span)
        self._step = spans

    def drafted(self) -> list[bool]:
        """Note that the drafter was run on what the target has just computed.

        Returns:
            For each span whether the drafter has seen everything up to its end.
        """
        spans, self._step = self._step, ()
        for span in spans:
            if span.request_id not in self._entered:
                self._follow(span, self._seen.get(span.request_id, 0) >= span.start)
        # What a request finds in the cache may be what another one computes in this very step.
        waiting = {span.request_id: span for span in spans if span.request_id in self._entered}
        progress = True
        while waiting and progress:
            progress = False
            for span in list(waiting.values()):
                found = self._entered[span.request_id]
                if found >= span.start and self._filled(span.blocks, found):
                    self._follow(waiting.pop(span.request_id), True)
                    progress = True
        for span in waiting.values():
            self._follow(span, False)
        for span in spans:
            self._entered.pop(span.request_id, None)
        return [self._seen[span.request_id] >= span.end for span in spans]

    def _filled(self, blocks: Sequence[int], num_tokens: int) -> bool:
        size = self._block_size
        return all(
            blocks[index] == NULL_BLOCK or self._slots[blocks[index]] >= min(size, num_tokens - index * size)
            for index in range(-(-num_tokens // size))
        )

    def _follow(self, span: Span, whole: bool) -> None:
        if not whole:
            self._seen[span.request_id] = -1  # whatever comes: the hole stays
            self._unsee(span)
            return
        self._seen[span.request_id] = span.end
        for index in range(span.start // self._block_size, -(-span.end // self._block_size)):
            self._slots[span.blocks[index]] = min(self._block_size, span.end - index * self._block_size)

    def _unsee(self, span: Span) -> None:
        for index in range(span.start // self._block_size, -(-span.end // self._block_size)):
            block = span.blocks[index]
            self._slots[block] = min(self._slots[block], max(0, span.start - index * self._block_size))
