"""The statistics schema: what a policy sees of a mismatch, in which order, under which version.

One float32 row per mismatch. d is the draft token, t* the argmax of the raw target logits (the lowest index where
several share the maximum), p and q the softmax of the raw target and draft logits. "Raw" means after the grammar mask
and before penalties, temperature and truncation, so that an arbiter means the same under every sampling setting.
All logarithms are natural. Log-probabilities are floored at ``LOGPROB_FLOOR`` and every other figure derived from them
is clamped to the same magnitude, so that a row is finite whenever its logits hold no NaN.

This module imports no torch: artefacts and configurations are checked without it.
"""

from __future__ import annotations

import hashlib

SCHEMA_NAME = "cospec-statistics"
SCHEMA_VERSION = 1

LOGPROB_FLOOR = -100.0  # exp(-100) is below the smallest float32: nothing observable lies beneath it

TINY = 2.0**-126
"""The smallest float32 with a full mantissa: below it no logarithm is taken of a probability."""

INPUT_LIMIT = 32.0
"""A network's standardised inputs are clamped to this magnitude: training has seen nothing so far off, and a
statistic that hardly varied there would drown the others."""

STATISTICS: tuple[tuple[str, str], ...] = (
    ("target_logprob_draft", "log p(d)"),
    ("target_logprob_top", "log p(t*)"),
    ("target_top2_gap", "log p of the first minus log p of the second choice of the target"),
    ("target_entropy", "entropy of p"),
    ("target_rank_draft", "log1p of the number of tokens the target ranks before d; the lower index wins a tie"),
    ("draft_logprob_draft", "log q(d)"),
    ("draft_logprob_target", "log q(t*)"),
    ("draft_top2_gap", "log q of the first minus log q of the second choice of the draft"),
    ("draft_entropy", "entropy of q"),
    ("kl_draft_target", "KL(q || p)"),
    ("block_position", "index of the position in its block, / K"),
    ("lookahead_matches", "number of consecutive following positions where t* = d, / K"),
    ("matches_before", "number of preceding positions of the block where t* = d, / K"),
    ("overrides_in_block", "number of overrides earlier in this block"),
    ("overrides_so_far", "log1p of the number of overrides earlier in this request"),
    ("output_position", "log1p of the index of the token in the response"),
)
NAMES: tuple[str, ...] = tuple(name for name, _ in STATISTICS)
NUM_STATISTICS = len(NAMES)
INDEX: dict[str, int] = {name: index for index, name in enumerate(NAMES)}

DRAFT_STATISTICS: tuple[str, ...] = (
    "draft_logprob_draft",
    "draft_logprob_target",
    "draft_top2_gap",
    "draft_entropy",
    "kl_draft_target",
)
"""Statistics that are 0 when the drafter has no logits (ngram, suffix)."""


def schema_hash(draft_logits: bool) -> str:
    """Return 16 hex digits that change with any name, definition, order, version or variant of the schema."""
    text = repr((SCHEMA_NAME, SCHEMA_VERSION, STATISTICS, LOGPROB_FLOOR, draft_logits))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
