"""Why a draft is not whole. An arbiter was trained on a drafter that had seen everything before its drafts: where it
has not, the block is verified strictly, and its positions are counted by reason. ``docs/draft_health.md`` lists the
paths of vLLM that lead there.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why the drafts of a block are verified strictly. The value is the counter's label; the order that of its file."""

    CONTEXT = "context"
    """The request has outgrown the drafter's context."""
    SKIPPED = "skipped"
    """The drafter did not run for the request in the step before: zeros or placeholders stand for its drafts."""
    LOST = "lost"
    """The block is not what the drafter proposed for the request, or its logits are gone."""
    CACHE = "cache"
    """The drafter's KV cache lacks tokens of the request: it missed a step, or a prefix or transfer it did not see."""
    DRAFT_COUNT = "draft_count"
    """What is drafted, and how much, depends on what else is being served."""


REASONS: tuple[Reason, ...] = tuple(Reason)
"""In the order of the counters."""
