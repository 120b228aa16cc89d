"""What the stages leave to each other: the order and number of the fields of every buffer, stated here alone.

A buffer is declared by naming its fields in order; the last name of a list is their number. Kernels import the names
one by one: Triton's cache of compiled programs looks at the values of globals, not at those of a module's attributes.
"""

from __future__ import annotations

from vllm.triton_utils import tl

from vllm_cospec.kernels.statistics import INDEX, LOGPROB_FLOOR, NUM_STATISTICS

FLOOR = tl.constexpr(LOGPROB_FLOOR)
INFINITY = tl.constexpr(float("inf"))

# Of a target row's tile, float32: TOP_K largest logits, then these two.
SUM, WEIGHTED, TILE_SUMS = map(tl.constexpr, range(3))
# Of a target row's tile, int32.
TILE_ARGMAX, TILE_RANK, TILE_NAN, TILE_INTS = map(tl.constexpr, range(4))
# Of a draft row's tile, float32.
DRAFT_MAX, DRAFT_SECOND, DRAFT_SUM, DRAFT_WEIGHTED, DRAFT_CROSS, DRAFT_NAN, DRAFT_FIELDS = map(tl.constexpr, range(7))
# Of a row whose tiles are combined, int32.
ACCEPTED, MATCH, STATUS, STRICT_TOKEN, TOP, RANK, ROW_INTS = map(tl.constexpr, range(7))
# Status of a row. OPEN: the policy may decide here, were the budget not spent; NO_DRAFT: nothing was proposed here.
CLOSED, OPEN, NO_DRAFT = map(tl.constexpr, range(3))
# Likewise, float32. The log-sums of exponentials are those of the raw row and of the strict verdict.
(
    LOGPROB_DRAFT, LOGPROB_TOP, GAP, ENTROPY, TOP_K_ENTROPY, LOGIT_DRAFT, LOGIT_TOP, RATIO, UNIFORM, RAW_LSE,
    TARGET_LSE, DRAFT_LSE, ROW_FLOATS,
) = map(tl.constexpr, range(13))  # fmt: skip

STATISTICS = tl.constexpr(NUM_STATISTICS)


def _column(name: str) -> tl.constexpr:
    """Place of a statistic in the row a policy sees."""
    return tl.constexpr(INDEX[name])


TARGET_LOGPROB_DRAFT = _column("target_logprob_draft")
TARGET_LOGPROB_TOP = _column("target_logprob_top")
TARGET_TOP2_GAP = _column("target_top2_gap")
TARGET_ENTROPY = _column("target_entropy")
TARGET_RANK_DRAFT = _column("target_rank_draft")
DRAFT_LOGPROB_DRAFT = _column("draft_logprob_draft")
DRAFT_LOGPROB_TARGET = _column("draft_logprob_target")
DRAFT_TOP2_GAP = _column("draft_top2_gap")
DRAFT_ENTROPY = _column("draft_entropy")
KL_DRAFT_TARGET = _column("kl_draft_target")
BLOCK_POSITION = _column("block_position")
LOOKAHEAD_MATCHES = _column("lookahead_matches")
MATCHES_BEFORE = _column("matches_before")
OVERRIDES_IN_BLOCK = _column("overrides_in_block")
OVERRIDES_SO_FAR = _column("overrides_so_far")
OUTPUT_POSITION = _column("output_position")
