"""Rollouts on a real engine: what training learns from is what verification did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import IMPORTED, forked
from rollouts import main

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "demo.toml"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Everything, from one engine; see rollouts.py."""
    return forked(main, CONFIG, IMPORTED)


@pytest.mark.engine
def test_a_unit_gives_the_same_whatever_the_engine_did_before(found: dict[str, Any]) -> None:
    assert found["repeatable"]
    assert found["units_differ"]


@pytest.mark.engine
def test_the_recorded_probability_is_the_arbiters_own_of_the_recorded_statistics(found: dict[str, Any]) -> None:
    assert found["decisions"] > 30
    assert 0.1 < found["kept"] / found["decisions"] < 0.9
    assert found["probability_error"] < 1e-6  # one row or many: float32 sums in another order
    # actions are drawn with it: within four standard deviations of the sum of so many coins
    assert abs(found["kept"] - found["expected_kept"]) < 4 * (found["decisions"] / 4) ** 0.5


@pytest.mark.engine
def test_rewards_are_the_tasks_of_the_texts(found: dict[str, Any]) -> None:
    assert found["own_rewards"] == found["rewards"]
    assert 0 < sum(found["rewards"]) < len(found["rewards"])


@pytest.mark.engine
@pytest.mark.parametrize(("which", "least"), [("roads", 30), ("sampled_roads", 20)])
def test_a_branch_that_decides_as_before_is_the_response_itself(which: str, least: int, found: dict[str, Any]) -> None:
    """Prefix, block, overrides before the mismatch, random numbers and steps: all of it is rebuilt from the cache."""
    roads = found[which]
    assert roads["branches"] > least
    assert 0 < roads["kept"] < roads["branches"]
    # a near-tie may go the other way in a batch of another shape; such a branch is given up
    assert roads["compared"] >= 0.97 * roads["branches"]
    assert roads["same_tokens"] == roads["same_steps"] == roads["same_text"] == roads["compared"]
    assert found["branches"] > 0
    assert found["branches_in_first_blocks"] > 0
    assert found["discarded"] <= 0.03 * found["branches"]


@pytest.mark.engine
def test_branches_start_when_their_own_response_is_done_and_not_the_slowest(found: dict[str, Any]) -> None:
    events = found["timeline"]
    slowest = max(i for i, (what, _, branch) in enumerate(events) if what == "done" and not branch)
    begun = [i for i, (what, _, branch) in enumerate(events) if what == "begun" and branch]
    assert len(begun) == found["branches"] + found["discarded"]
    last = None  # what was done last
    for what, seed, branch in events:
        if what == "done":
            last = seed, branch
        elif branch:  # nothing else is done between a response and its branches
            assert last == (seed, False)
    assert sum(i < slowest for i in begun) > len(begun) / 2
    # and they run beside the responses that are not done: some have come to their end before
    assert ("done", True) in {(what, branch) for what, _, branch in events[:slowest]}


@pytest.mark.engine
def test_sampled_branches_may_have_several_continuations_of_each_action(found: dict[str, Any]) -> None:
    several = found["several"]
    assert several["repeatable"]
    assert several["branches"] > 10
    assert several["discarded"] <= 0.05 * (several["continuations"] + several["discarded"])
    # the other action three times, the response's own twice more
    assert 5 * several["branches"] * 0.95 <= several["continuations"] <= 5 * several["branches"]
    assert several["between"] > 0  # continuations of one action differ
    assert several["thirds"]


@pytest.mark.engine
def test_weights_pushed_in_memory_decide_from_the_next_rollout_on(found: dict[str, Any]) -> None:
    assert found["always"] == 1.0
    assert found["never"] == 0.0


@pytest.mark.engine
def test_a_reward_that_hangs_costs_its_answers_and_nothing_else(found: dict[str, Any]) -> None:
    hanging = found["hanging"]
    assert hanging["rewards"][1:] == found["rewards"][1:]
    assert hanging["rewards"][0] == 0.0
    assert hanging["failures"]
    assert all("took longer than 2 s" in failure for failure in hanging["failures"])
    assert hanging["same_texts"]
    assert hanging["same_decisions"]
    assert found["repeatable_after_a_bad_reward"]


@pytest.mark.engine
def test_groups_of_sampled_responses_differ_and_need_no_branches(found: dict[str, Any]) -> None:
    group = found["group"]
    assert group["responses"] == 4 * 24
    assert group["problems"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert group["diverse"] >= 12
    assert group["branches"] == 0
    assert group["samples"] > 100
    assert group["nonzero"] > 0
