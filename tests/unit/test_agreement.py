"""What both continuations of every mismatch say: who chose the better one, and what a perfect choice would be worth."""

from __future__ import annotations

import numpy as np
from scripts import benchmark

from vllm_cospec.training.rollout.episodes import Episodes

agreement = benchmark("agreement")


def test_choices_are_compared_with_their_outcomes() -> None:
    found = agreement.figures(
        Episodes(
            # the first response has no mismatch; the second was wrong, the third right, the fourth wrong
            reward=np.array([1.0, 0.0, 1.0, 0.0]),
            episode=np.array([1, 1, 2, 3]),
            kept=np.array([True, False, True, False]),
            branch_decision=np.array([0, 1, 2, 3]),
            branch_keep=np.array([0.0, 1.0, 1.0, 1.0]),
            branch_drop=np.array([0.0, 0.0, 0.0, 0.0]),
        )
    )
    assert (found["num_mismatches"], found["num_branched"], found["num_telling"]) == (4, 4, 3)
    assert found["agreement"] == 1 / 3  # of the second, third and fourth mismatch only the third was kept
    assert found["always_target"] == 0.0
    assert (found["keep_was_better"], found["keep_was_worse"]) == (0.75, 0.0)
    assert found["accuracy"] == 0.5
    assert found["best_first"] == 0.75  # the second response's first mismatch changes nothing
    assert found["best_one"] == 1.0


def test_a_first_mismatch_that_was_not_branched_leaves_its_response_as_it_is() -> None:
    found = agreement.figures(
        Episodes(
            reward=np.array([0.0]), episode=np.array([0, 0]), kept=np.array([True, False]),
            branch_decision=np.array([1]), branch_keep=np.array([1.0]), branch_drop=np.array([0.0]),
        )
    )  # fmt: skip
    assert (found["best_first"], found["best_one"]) == (0.0, 1.0)
