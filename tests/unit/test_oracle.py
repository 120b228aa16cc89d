"""The oracle's game, on hand-worked derivations."""

from __future__ import annotations

from vllm_cospec.training.measure.oracle import Walk, walk


def test_full_agreement_emits_a_block_and_a_bonus_per_step() -> None:
    truth = list(range(13))
    assert walk(truth, truth, truth, k=5) == Walk(True, 13, 3)  # 1, then 6, then 6


def test_the_oracle_takes_the_draft_where_the_draft_is_right() -> None:
    truth, target = [1, 2, 3, 4], [1, 9, 3, 4]
    assert walk(target, truth, truth, k=3) == Walk(True, 4, 2)


def test_the_oracle_takes_the_target_where_the_draft_is_wrong() -> None:
    truth, draft = [1, 2, 3, 4], [1, 9, 3, 4]
    assert walk(truth, draft, truth, k=3) == Walk(True, 4, 3)  # the block ends at the mismatch


def test_nobody_is_asked_where_both_agree_on_a_wrong_token() -> None:
    assert walk([1, 9, 3], [1, 9, 3], [1, 2, 3], k=3) == Walk(False, 1, 2)


def test_both_wrong_in_different_ways_is_lost() -> None:
    assert walk([1, 9, 3], [1, 8, 3], [1, 2, 3], k=3) == Walk(False, 1, 2)


def test_the_first_and_the_bonus_token_are_the_targets_alone() -> None:
    truth = [1, 2, 3, 4]
    assert not walk([9, 2, 3, 4], truth, truth, k=3).correct
    assert not walk([1, 2, 3, 9], truth, truth, k=2).correct
    assert walk([1, 2, 3, 9], truth, truth, k=3).correct
