"""Which positions of a block matter: those whose token can reach the response, and those in a part of it.

A position is only ever decided once all drafts before it are kept, so what stands before it in the response is known
beforehand, from the drafts alone. R rows lie request after request; ``before`` holds the token in front of each row: of
a request's first row the last token emitted, of the others the draft of the row before.
"""

from __future__ import annotations

import torch
from torch import Tensor

STOPS = 8  # tokens that end a response, as many as are looked at; vLLM itself looks at all
NO_STOP = -2  # no token, and no placeholder either


def undeliverable(before: Tensor, step: Tensor, output_position: Tensor, ends: Tensor) -> Tensor:
    """Return where a token could not reach the response, bool [R]: it is full, or a token before has ended it.

    The definition; the CPU's loops and the GPU's kernels decide it where they come to a row, and are held to this.

    Args:
        before: [R] int.
        step: [R] int, index of each row in its request.
        output_position: [R] int, index in the response of the row's token.
        ends: [R, 1 + STOPS] int, from :func:`ends_of` of each row's request.
    """
    hits = ((before.unsqueeze(1) == ends[:, 1:]).any(1) & (step > 0)).cumsum(0)
    first = torch.arange(len(step), device=step.device) - step
    return (output_position >= ends[:, 0]) | (hits > hits[first])


def ends_of(length: int, tokens: list[int]) -> list[int]:
    """Return what ends a response: its largest length, then ``STOPS`` token ids, padded with ``NO_STOP``."""
    return [min(length, 2**31 - 1), *(tokens + [NO_STOP] * STOPS)[:STOPS]]


SCOPES = ("all", "thinking", "answer")
"""Where in a response drafts are arbitrated; elsewhere they are verified strictly."""
ANSWERING, THINKING, UNKNOWN = range(3)
"""What a token belongs to. Unknown: a token was missed that may have been a marker, so both scopes are closed."""


def parts(before: Tensor, step: Tensor, markers: tuple[int, int], start: Tensor) -> Tensor:
    """Return which part of its response each row's token belongs to, int64 [R].

    Args:
        before: [R] int; a negative number where the token has been looked at already.
        step: [R] int, index of each row in its request.
        markers: the tokens that begin and end thinking.
        start: [R] int, the part each request's block begins in, before the first of these tokens.
    """
    index = torch.arange(len(step), device=step.device)
    mark = torch.where(before == markers[0], 2 * index + THINKING, -1)
    mark = torch.where(before == markers[1], 2 * index + ANSWERING, mark)
    latest = mark.cummax(0).values if len(mark) else mark
    return torch.where(latest >= 2 * (index - step), latest % 2, start.long())


def out_of_scope(part: Tensor, scope: Tensor) -> Tensor:
    """Return where a draft that strict verification rejects may not be kept, bool.

    Args:
        part: from :func:`parts`.
        scope: int, index into ``SCOPES``.
    """
    return ((scope == 1) & (part != THINKING)) | ((scope == 2) & (part != ANSWERING))


def part_after(part: int, tokens: list[int], markers: tuple[int, int]) -> int:
    """Return what the token behind these belongs to, where the first of them belongs to ``part``."""
    for token in reversed(tokens):
        if token in markers:
            return (THINKING, ANSWERING)[markers.index(token)]
    return part
