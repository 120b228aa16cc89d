"""The truth about arbitration, in plain torch, one request and one position at a time.

Nothing here is fast. The CPU path and the Triton kernels are tested against it, and whoever wants to know what a
decision depends on reads this file. Statistics are computed in float64 and rounded once, to float32.

NaN: a mismatch is strict where the raw target logits or the draft's hold a NaN or nothing finite. It counts as a
mismatch, but the policy is not asked and nothing is recorded. The kernels read the draft's row only for policies that
look at it or when decisions are collected, and notice a NaN there only then.

A block is verified from left to right. At each position strict verification says accept or reject; at a reject the
policy is consulted if keeping the draft is allowed there, and only a kept draft lets the block go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_cospec.kernels.regret import REGRET_UNIT, in_units
from vllm_cospec.kernels.statistics import LOGPROB_FLOOR, NAMES

CEILING = -LOGPROB_FLOOR


@dataclass
class Context:
    """What a decision depends on besides the two rows of logits."""

    position: int  # index in the block
    num_speculative_tokens: int  # K
    lookahead_matches: int = 0
    matches_before: int = 0
    overrides_in_block: int = 0
    overrides_so_far: int = 0
    output_position: int = 0


def log_probabilities(logits: Tensor) -> Tensor:
    """Floored log-softmax of one row, float64 [V]. NaN anywhere, or no finite logit, makes every entry NaN."""
    return torch.log_softmax(logits.double(), dim=-1).clamp(min=LOGPROB_FLOOR)


def rank(logits: Tensor, token: int) -> int:
    """Return how many tokens stand before ``token`` when logits are sorted downwards, lower index first in a tie."""
    value = logits[token]
    return int((logits > value).sum() + (logits[:token] == value).sum())


def top2_gap(logp: Tensor) -> float:
    """Return the difference of the two largest log-probabilities, at most ``CEILING``."""
    first, second = logp.topk(2).values.tolist()
    return min(first - second, CEILING)


def entropy(logp: Tensor) -> float:
    """Return the entropy in nats."""
    return float(-(logp.exp() * logp).sum())


def row_statistics(target_logits: Tensor, draft_logits: Tensor | None, draft_token: int, context: Context) -> Tensor:
    """Return the statistics of one mismatch, float32 [16], in the order of the schema.

    Args:
        target_logits: raw target logits, [V].
        draft_logits: raw draft logits, [V], or None for a drafter without logits.
        draft_token: d.
        context: the rest.
    """
    k = context.num_speculative_tokens
    logp = log_probabilities(target_logits)
    top = int(target_logits.argmax())
    values = {
        "target_logprob_draft": logp[draft_token].item(),
        "target_logprob_top": logp[top].item(),
        "target_top2_gap": top2_gap(logp),
        "target_entropy": entropy(logp),
        "target_rank_draft": math.log1p(rank(target_logits, draft_token)),
        "draft_logprob_draft": 0.0,
        "draft_logprob_target": 0.0,
        "draft_top2_gap": 0.0,
        "draft_entropy": 0.0,
        "kl_draft_target": 0.0,
        "block_position": context.position / k,
        "lookahead_matches": context.lookahead_matches / k,
        "matches_before": context.matches_before / k,
        "overrides_in_block": float(context.overrides_in_block),
        "overrides_so_far": math.log1p(context.overrides_so_far),
        "output_position": math.log1p(context.output_position),
    }
    if draft_logits is not None:
        logq = log_probabilities(draft_logits)
        values["draft_logprob_draft"] = logq[draft_token].item()
        values["draft_logprob_target"] = logq[top].item()
        values["draft_top2_gap"] = top2_gap(logq)
        values["draft_entropy"] = entropy(logq)
        values["kl_draft_target"] = float((logq.exp() * (logq - logp)).sum().clamp(0, CEILING))
    return torch.tensor([values[name] for name in NAMES], dtype=torch.float32)


@dataclass
class Block:
    """One request at one step. n is the number of its draft tokens."""

    draft_tokens: list[int]  # n
    accepted_by_strict: list[bool]  # n, what strict verification says of each position by itself
    target_tokens: list[int]  # n, emitted where the draft is not kept
    bonus_token: int
    raw_target_logits: Tensor  # [n, V]
    processed_target_logits: Tensor  # [n, V], decide what is legal
    draft_logits: Tensor | None  # [n, V]
    num_speculative_tokens: int  # K
    arbitrated: bool = True  # False: strict
    junk: bool = False  # the drafter did not propose these tokens: strict
    output_position: int = 0  # index in the response of the block's first token
    overrides_so_far: int = 0
    max_overrides: int | None = None
    exact_tokens: int = 0
    regret_so_far: float = 0.0
    max_regret: float | None = None


@dataclass
class BlockResult:
    """What verification makes of a block."""

    tokens: list[int] = field(default_factory=list)  # emitted, at least 1
    num_accepted: int = 0  # draft tokens kept, overrides included
    mismatches: list[int] = field(default_factory=list)  # drafts the scan reached that strict would reject
    overrides: list[int] = field(default_factory=list)  # those of them that were kept
    statistics: list[Tensor] = field(default_factory=list)  # one row per consulted mismatch
    regret: float = 0.0  # of the overrides


def regret(logits: Tensor, token: int) -> float:
    """Return what keeping ``token`` gives up: log p(t*) - log p(token) of raw target logits [V], rounded up to a unit.

    Infinite where it is not a number.
    """
    given_up = float(logits.float().max() - logits[token].float())
    return math.ceil(given_up / REGRET_UNIT) * REGRET_UNIT if math.isfinite(given_up) else math.inf


def affordable(block: Block, position: int, spent: float) -> bool:
    """Return whether the budget has room for a mismatch, with ``spent`` by the overrides earlier in this block."""
    budget = in_units(block.max_regret)
    if budget == math.inf:
        return True
    spent += block.regret_so_far + regret(block.raw_target_logits[position], block.draft_tokens[position])
    return budget > 0 and spent <= budget


def may_override(block: Block, position: int, num_overrides: int, spent: float) -> bool:
    """Return whether a mismatch may be decided by the policy at all, after these overrides of the block."""
    token = block.draft_tokens[position]
    vocabulary = block.raw_target_logits.shape[-1]
    return (
        block.arbitrated
        and not block.junk
        and 0 <= token < vocabulary
        and math.isfinite(block.processed_target_logits[position, token])
        and block.output_position + position >= block.exact_tokens
        and (block.max_overrides is None or block.overrides_so_far + num_overrides < block.max_overrides)
        and affordable(block, position, spent)
    )


def verify_block(block: Block, keep: Callable[[Tensor, int], bool]) -> BlockResult:
    """Verify one block.

    Args:
        block: the request's step.
        keep: the policy: statistics of a mismatch, float32 [16], and its position -> True to keep the draft. It is
            not called for rows with NaN: those are strict.
    """
    n = len(block.draft_tokens)
    matches = [
        int(row.argmax()) == token for row, token in zip(block.raw_target_logits, block.draft_tokens, strict=True)
    ]
    result = BlockResult()
    for position in range(n):
        if not block.accepted_by_strict[position]:
            if not block.junk and block.draft_tokens[position] >= 0:  # else there is no draft to disagree with
                result.mismatches.append(position)
            if not may_override(block, position, len(result.overrides), result.regret):
                return _stop(block, result, position)
            lookahead = 0
            while position + 1 + lookahead < n and matches[position + 1 + lookahead]:
                lookahead += 1
            statistics = row_statistics(
                block.raw_target_logits[position],
                None if block.draft_logits is None else block.draft_logits[position],
                block.draft_tokens[position],
                Context(
                    position=position,
                    num_speculative_tokens=block.num_speculative_tokens,
                    lookahead_matches=lookahead,
                    matches_before=sum(matches[:position]),
                    overrides_in_block=len(result.overrides),
                    overrides_so_far=block.overrides_so_far + len(result.overrides),
                    output_position=block.output_position + position,
                ),
            )
            if statistics.isnan().any():
                return _stop(block, result, position)
            result.statistics.append(statistics)
            if not keep(statistics, position):
                return _stop(block, result, position)
            result.overrides.append(position)
            result.regret += regret(block.raw_target_logits[position], block.draft_tokens[position])
        result.tokens.append(block.draft_tokens[position])
        result.num_accepted += 1
    result.tokens.append(block.bonus_token)
    return result


def _stop(block: Block, result: BlockResult, position: int) -> BlockResult:
    result.tokens.append(block.target_tokens[position])
    return result
