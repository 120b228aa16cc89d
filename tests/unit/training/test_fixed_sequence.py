"""The order of thresholds, what passes, and which one is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_cospec.training.measure.fixed_sequence import best_passed, sequence_bounds, threshold_sequence


def test_a_sequence_goes_from_keeping_nothing_to_keeping_everything_and_beyond_the_grid_on_both_sides() -> None:
    sequence = threshold_sequence([0.2, 0.5, 0.8, 0.5])
    assert sequence[0] == 1.0
    assert sequence[-1] == 0.0
    assert list(sequence) == sorted(set(sequence), reverse=True)
    assert {0.2, 0.5, 0.8} < set(sequence)
    assert len([t for t in sequence if t > 0.8]) >= 3
    assert len([t for t in sequence if t < 0.2]) >= 3
    assert not [t for t in sequence if 0.2 < t < 0.8 and t != 0.5]


@pytest.mark.parametrize("grid", [[], [0.0], [1.0], [0.0, 1.0], [0.00001]])
def test_both_ends_belong_to_every_sequence(grid: list[float]) -> None:
    sequence = threshold_sequence(grid)
    assert (sequence[0], sequence[-1]) == (1.0, 0.0)
    assert set(grid) <= set(sequence)


def test_a_threshold_behind_one_that_fails_does_not_pass() -> None:
    strict = np.r_[np.ones(100), np.zeros(100)]
    worse, better = strict.copy(), np.ones(200)
    worse[:20] = 0
    bounds = sequence_bounds(np.stack([strict, worse, better]), strict, 0.95)
    assert bounds[0] < 0.02
    assert 0.1 < bounds[1] == bounds[2] < 0.2


def scores_of(*right: int, n: int = 1000) -> np.ndarray:
    """Right and wrong answers of each threshold: as many right, from the first problem on."""
    return np.array([np.arange(n) < count for count in right], np.float64)


def test_the_most_accurate_one_that_passes_is_chosen_and_speed_decides_between_equals() -> None:
    bounds, saved = [0.0, 0.004, 0.02, 0.5], [0.5, 0.6, 0.7, 0.9]
    equal, better = scores_of(800, 800, 800, 1000), scores_of(900, 800, 800, 1000)
    assert best_passed(bounds, equal, saved, 0.02, 0.05) == 2
    assert best_passed(bounds, equal, saved, 0.01, 0.05) == 1
    assert best_passed(bounds, better, saved, 0.02, 0.05) == 0
    assert best_passed(bounds, scores_of(810, 800, 805, 1000), saved, 0.02, 0.0) == 0
    assert best_passed(bounds, equal, saved, 0.02, 0.0) == 0  # nothing gained: as strict as can be
    assert best_passed(bounds, scores_of(100, 1000, 1000, 1000), saved, 0.0005, 0.05) == 0  # nothing but strict passes


def test_of_those_that_scores_do_not_tell_apart_the_fastest_is_chosen() -> None:
    bounds, saved = [0.0, 0.0, 0.0, 0.0], [0.5, 0.6, 0.7, 0.8]
    # 30 problems are right at the one and wrong at the other: a standard error of 0.0054
    near, far = scores_of(700, 830, 828, 800), scores_of(700, 830, 800, 800)
    near[2, 828:843], near[2, 813:828] = 1.0, 0.0  # 15 each way, so 2 of 1,000 apart
    assert best_passed(bounds, near, saved, 0.02, 0.0) == 2
    assert best_passed(bounds, far, saved, 0.02, 0.0) == 1  # 30 one way, none the other: told apart
    assert best_passed([0.0, 0.0, 0.5, 0.5], near, saved, 0.02, 0.0) == 1  # what does not pass is no tie
    assert best_passed(bounds, near[[0, 2, 1, 3]], [0.5, 0.8, 0.6, 0.9], 0.02, 0.0) == 1  # faster, so stricter
    assert best_passed(bounds, near[[1, 2, 0, 3]], saved, 0.02, 0.0) == 0  # strict is best: no tie with it
