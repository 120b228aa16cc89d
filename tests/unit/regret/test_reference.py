"""The regret budget of the reference, against a statement in exact arithmetic that knows nothing of its code."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from kernel_cases import block, cases

from vllm_cospec.kernels.reference import Block, BlockResult, regret, verify_block
from vllm_cospec.kernels.regret import MAX_REGRET, REGRET_UNIT, in_units


def given_up(logits: torch.Tensor, token: int) -> Fraction | None:
    """The definition: the distance of two logits, which is that of the log-probabilities; None for no number."""
    values = logits.float().numpy()
    distance = values.max() - values[token] if np.isfinite(values[token]) else np.float32(np.nan)
    return Fraction(float(distance)) if np.isfinite(distance) else None


def allowed(block: Block, already: list[int], position: int) -> bool:
    """Whether the overrides at ``already`` and ``position`` are within the budget, in exact arithmetic."""
    if block.max_regret is None:
        return True
    if Fraction(block.max_regret) < Fraction(1, 1024):  # nothing that costs anything fits, and a tie is no exception
        return False
    unit, total = Fraction(1, 1024), Fraction(block.regret_so_far)
    for where in [*already, position]:
        exact = given_up(block.raw_target_logits[where], block.draft_tokens[where])
        if exact is None:
            return False
        total += math.ceil(exact / unit) * unit
    return total <= Fraction(block.max_regret)


def keep_all(statistics: torch.Tensor, position: int) -> bool:
    return True


def check(block: Block, keep_rate: float, seed: int) -> BlockResult:
    """Compare with the same block without a budget, whose policy turns down what the budget has no room for."""
    coins = [random.Random(f"{seed}/{i}").random() < keep_rate for i in range(len(block.draft_tokens))]
    kept: list[int] = []

    def within(statistics: torch.Tensor, position: int) -> bool:
        decided = coins[position] and allowed(block, kept, position)
        if decided:
            kept.append(position)
        return decided

    found = verify_block(block, lambda statistics, position: coins[position])
    expected = verify_block(replace(block, max_regret=None), within)
    assert found.tokens == expected.tokens
    assert found.overrides == expected.overrides == kept
    spent = sum((given_up(block.raw_target_logits[i], block.draft_tokens[i]) or 0 for i in kept), Fraction(0))
    if block.max_regret is not None:
        assert spent + Fraction(block.regret_so_far) <= max(Fraction(block.max_regret), Fraction(block.regret_so_far))
        assert spent <= Fraction(found.regret) < spent + len(kept) * Fraction(1, 1024) + Fraction(1, 10**9)
    return found


@pytest.mark.parametrize("regime", ["mixed", "mixed_bf16", "ties", "steep", "nan_and_inf"])
@pytest.mark.parametrize("budget", [0.0, 0.0009, 0.5, 3.0, 40.0, None])
def test_overrides_are_those_the_budget_has_room_for(regime: str, budget: float | None) -> None:
    seen = 0
    for seed, case in enumerate(cases(regime)[:12]):
        for own in case.blocks:
            already = 0.0 if budget is None or seed % 2 else math.floor(budget * 300) / 1024
            seen += len(check(replace(own, max_regret=budget, regret_so_far=already), 0.8, seed).overrides)
    if budget is None or budget == 40:
        assert seen > 0
    if budget is not None and budget < REGRET_UNIT:
        assert seen == 0


def test_a_budget_of_nothing_is_strict_even_where_giving_up_costs_nothing() -> None:
    tied = block()  # flat rows: every draft is as likely as the target's token
    assert verify_block(replace(tied, max_regret=0.0), keep_all).overrides == []
    assert verify_block(replace(tied, max_regret=REGRET_UNIT), keep_all).overrides == [0, 1, 2, 3]


def test_a_mismatch_that_does_not_fit_ends_the_block_and_is_not_put_to_the_policy() -> None:
    logits = torch.zeros(4, 5)
    logits[:, 2] = torch.tensor([1.0, 1.0, 0.5, 0.5])
    found = verify_block(block(raw_target_logits=logits, max_regret=2.25), keep_all)
    assert found.overrides == [0, 1]
    assert found.mismatches == [0, 1, 2]
    assert len(found.statistics) == 2
    assert found.tokens == [1, 1, 2]
    assert found.regret == 2.0


def test_what_earlier_blocks_spent_counts() -> None:
    logits = torch.zeros(4, 5)
    logits[:, 2] = 1.0
    for spent, overrides in ((0.0, 3), (1.0, 2), (2.5, 0), (3.0, 0), (4.0, 0)):
        found = verify_block(block(raw_target_logits=logits, max_regret=3.0, regret_so_far=spent), keep_all)
        assert len(found.overrides) == overrides


def test_regrets_are_rounded_up_and_budgets_down() -> None:
    row = torch.tensor([0.0, -1e-6, -0.25, -(0.25 + 1e-4), -math.inf])
    assert [regret(row, token) / REGRET_UNIT for token in range(4)] == [0, 1, 256, 257]
    assert regret(row, 4) == math.inf
    assert [in_units(b) / REGRET_UNIT for b in (0.0, 1e-6, 0.25, 0.2509, MAX_REGRET)] == [0, 0, 256, 256, 2.0**23]
    assert in_units(None) == math.inf


def test_sums_up_to_the_largest_budget_are_exact_in_float32() -> None:
    rng = np.random.default_rng(0)
    units = rng.integers(1, 2**14, 1000)
    total = np.float32(0)
    for count in units:
        total = np.float32(total + np.float32(count * REGRET_UNIT))
    assert total == units.sum() * REGRET_UNIT <= 2 * MAX_REGRET
