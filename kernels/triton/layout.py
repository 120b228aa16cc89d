"""What the stages leave to each other: the order and number of the fields of every buffer, stated here alone.

All of them hold float32; the integers among them, token ids and counts, are exact up to ``step.MAX_VOCAB_SIZE``. A
buffer is declared by naming its fields in order, and the last name of a list is their number. Kernels import the names
one by one: Triton's cache of compiled programs looks at the values of globals, not at those of a module's attributes.
"""

from __future__ import annotations

from vllm.triton_utils import tl

from vllm_cospec.kernels.statistics import INDEX, LOGPROB_FLOOR, NUM_STATISTICS

FLOOR = tl.constexpr(LOGPROB_FLOOR)
INFINITY = tl.constexpr(float("inf"))

# A block of a row, stage 1: of the raw logits, of the processed ones for strict verification where the raw ones do not
# serve, of the draft's at the request's temperature, and the one statistic that a rule reads and that is cheap enough
# to be had in the same pass.
(
    RAW_MAX, RAW_ARGMAX, RAW_SUM, PROCESSED_MAX, PROCESSED_ARGMAX, PROCESSED_SUM, SCALED_DRAFT_MAX, SCALED_DRAFT_SUM,
    EXTRA, BLOCK_FIELDS,
) = map(tl.constexpr, range(10))  # fmt: skip
# Which statistic that is. TOP_K takes as many fields from EXTRA on.
NOTHING, ENTROPY, RANK, TOP_K = map(tl.constexpr, range(4))

# A row, stage 2. LOG_SUM: log sum exp(z - max z); the log-sums of exponentials are those of the strict verdict.
(
    ACCEPTED, STRICT_TOKEN, STATUS, MATCH, TOP, LOGIT_TOP, LOGIT_DRAFT, LOG_SUM, EXTRA_STATISTIC, RATIO, UNIFORM,
    TARGET_LSE, DRAFT_LSE, ROW_FIELDS,
) = map(tl.constexpr, range(14))  # fmt: skip
# Status of a row. OPEN: the policy may decide here, were the budget not spent; NO_DRAFT: nothing was proposed here.
CLOSED, OPEN, NO_DRAFT = map(tl.constexpr, range(3))

# A block of target and draft row at a mismatch, stage 3. A power of two of fields makes shifts of the addresses.
(
    MOMENT, RANK_IN_BLOCK, SECOND, DRAFT_MAX, DRAFT_SECOND, DRAFT_SUM, DRAFT_MOMENT, CROSS, JOINT, MISMATCH_FIELDS,
) = map(tl.constexpr, (*range(9), 16))  # fmt: skip

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
