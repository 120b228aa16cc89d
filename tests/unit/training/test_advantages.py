"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import LearnerConfig
from vllm_cospec.training.learning.advantages import (
    branch_advantages,
    episode_returns,
    group_advantages,
    load_advantage,
)
from vllm_cospec.training.learning.overlong import treat_overlong
from vllm_cospec.training.rollout.episodes import Episodes


def episodes(**changes: object) -> Episodes:
    """Four episodes of two problems, a decision in each, two in the first."""
    arrays: dict[str, object] = {
        "problem": np.array([0, 0, 1, 1]),
        "reward": np.array([1.0, 0.0, 1.0, 1.0]),
        "tokens": np.array([10, 10, 20, 10]),
        "steps": np.array([5, 10, 5, 5]),
        "capped": np.zeros(4, bool),
        "texts": ["a", "b", "c", "d"],
        "episode": np.array([0, 0, 1, 2, 3]),
        "statistics": np.arange(80, dtype=np.float32).reshape(5, 16),
        "kept": np.array([True, False, True, False, True]),
        "probability": np.array([0.25, 0.25, 0.5, 0.75, 0.9]),
        "output_position": np.array([3, 6, 2, 4, 5]),
        "branch_decision": np.array([1, 3]),
        "branch_weight": np.array([1.0, 1.0]),
        "branch_keep": np.array([1.0, 0.0]),
        "branch_drop": np.array([0.0, 1.0]),
        "branch_keep_saved": np.array([0.5, 0.25]),
        "branch_drop_saved": np.array([0.5, 0.75]),
    }
    return Episodes(**{**arrays, **changes})  # type: ignore[arg-type]


def test_a_return_is_the_reward_plus_the_weighted_share_of_steps_saved() -> None:
    assert episode_returns(episodes(), 0.1) == pytest.approx([1.05, 0.0, 1.075, 1.05])


def test_group_advantages_compare_with_the_other_responses_to_the_prompt() -> None:
    samples = group_advantages(episodes(), 0.1)
    # problem 0: 1.05 against 0.0; problem 1: 1.075 against 1.05
    assert samples.advantage == pytest.approx([1.05, 1.05, -1.05, 0.025, -0.025])
    assert samples.probability == pytest.approx([0.25, 0.75, 0.5, 0.25, 0.9])  # of the action that was taken
    assert (samples.keep == [True, False, True, False, True]).all()
    assert (samples.weight == 1).all()


def test_group_of_three_leaves_its_own_out() -> None:
    three = episodes(problem=np.array([7, 7, 7, 8]), reward=np.array([1.0, 0.0, 0.5, 1.0]))
    samples = group_advantages(three, 0.0)
    assert samples.advantage == pytest.approx([0.75, 0.75, -0.75, 0.0, 0.0])  # the last is alone: nothing to learn


def test_branch_advantages_are_the_returns_less_their_mean_under_the_policy() -> None:
    samples = branch_advantages(episodes(), 0.0)
    # decision 1: keep 0.25, returns 1 and 0: mean 0.25; decision 3: keep 0.75, returns 0 and 1: mean 0.25
    assert samples.advantage == pytest.approx([0.75, -0.25, -0.25, 0.75])
    assert samples.weight == pytest.approx([0.25, 0.75, 0.75, 0.25])
    assert samples.probability == pytest.approx(samples.weight)
    assert (samples.keep == [True, True, False, False]).all()
    assert (samples.statistics == episodes().statistics[[1, 3, 1, 3]]).all()
    assert (samples.weight * samples.advantage).sum() == pytest.approx(0)


def test_branch_advantages_count_the_speed_beside_the_answer() -> None:
    samples = branch_advantages(episodes(), 0.1)
    # decision 1: 1.05 and 0.05, mean 0.3; decision 3: 0.025 and 1.075, mean 0.75 * 0.025 + 0.25 * 1.075
    assert samples.advantage == pytest.approx([0.75, 0.025 - 0.2875, -0.25, 1.075 - 0.2875])
    assert (samples.weight * samples.advantage).sum() == pytest.approx(0)
    assert list(episodes().difference()) == [1.0, -1.0]  # labels are about answers alone


def test_the_acceptance_length_counts_steps_after_the_prompts_own() -> None:
    # 9 + 9 + 19 + 9 tokens in 4 + 9 + 4 + 4 steps
    assert episodes().acceptance_length == pytest.approx(46 / 21)
    assert Episodes().acceptance_length == 1.0


def test_merging_moves_indices_along() -> None:
    both = Episodes.merge([episodes(), episodes()])
    assert list(both.episode) == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert list(both.branch_decision) == [1, 3, 6, 8]
    assert both.texts == ["a", "b", "c", "d"] * 2
    assert len(Episodes.merge([]).reward) == 0
    assert len(Episodes.merge([Episodes(), episodes(), Episodes()]).kept) == 5
    counted = Episodes.merge([episodes(failures=["x"], discarded=2, continuations=3), episodes(discarded=1)])
    assert (counted.failures, counted.discarded, counted.graded) == (["x"], 3, 8 + 3)


def test_no_episode_gives_no_sample() -> None:
    for name in ("group", "branch"):
        assert len(load_advantage(name)(Episodes.merge([]), 0.1).keep) == 0


def test_an_unknown_advantage_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"learner.advantage: unknown 'gae'; known are branch, group"):
        load_advantage("gae")


CUT_OFF = {
    "capped": np.array([True, False, False, False]),
    "branch_keep_capped": np.array([False, True]),
    "branch_drop_capped": np.array([True, False]),
}


def test_answers_that_were_cut_off_are_graded_penalised_or_left_out() -> None:
    own = episodes(**CUT_OFF)
    assert treat_overlong(own, LearnerConfig()) is own
    less = treat_overlong(own, LearnerConfig(overlong="penalise", overlong_penalty=0.25))
    assert less.reward == pytest.approx([0.75, 0.0, 1.0, 1.0])
    assert less.branch_keep == pytest.approx([1.0, -0.25])
    assert less.branch_drop == pytest.approx([-0.25, 1.0])
    assert list(own.reward) == [1.0, 0.0, 1.0, 1.0]  # what is logged stays
    masked = treat_overlong(own, LearnerConfig(overlong="mask"))
    assert list(masked.problem) == [0, 1, 1]
    assert masked.texts == ["b", "c", "d"]
    assert list(masked.episode) == [0, 1, 2]
    assert (masked.statistics == own.statistics[2:]).all()
    assert not len(masked.branch_decision)
    samples = group_advantages(masked, 0.0)
    assert samples.advantage == pytest.approx([0.0, 0.0, 0.0])  # the other response to problem 0 is gone
    assert not len(branch_advantages(masked, 0.0).keep)


def test_a_branch_stays_with_its_decision_when_others_are_left_out() -> None:
    cut_off = {**CUT_OFF, "branch_keep_capped": np.array([False, False])}
    masked = treat_overlong(episodes(**cut_off), LearnerConfig(overlong="mask"))
    assert list(masked.branch_decision) == [1]
    assert (branch_advantages(masked, 0.0).statistics == episodes().statistics[[3, 3]]).all()
    assert list(masked.difference()) == [-1.0]


def test_a_branch_counts_as_often_as_the_mismatches_it_stands_for() -> None:
    once, weighted = (
        branch_advantages(episodes(branch_weight=np.array(weights)), 0.0) for weights in ([1.0, 1.0], [1.0, 3.0])
    )
    assert list(weighted.advantage) == list(once.advantage)
    assert weighted.weight == pytest.approx(once.weight * [1, 3, 1, 3])
