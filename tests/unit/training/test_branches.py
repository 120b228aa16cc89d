"""Which mismatches of a response are branched at, and what each stands for."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_cospec.runners.trace import Decision
from vllm_cospec.training.rollout.branches import LEAST_DOUBT, branch_request, choose
from vllm_cospec.training.rollout.engine import Request, Response


def decision(place: int, probability: float | None, block_position: int = 0) -> Decision:
    return Decision("r", place, block_position, torch.zeros(16), False, probability, b"state")


def response(probabilities: list[float | None]) -> Response:
    decisions = [decision(place, probability) for place, probability in enumerate(probabilities, 1)]
    return Response(list(range(100, 140)), "", [1] * 40, False, decisions)


def test_all_are_chosen_where_there_are_few() -> None:
    chosen = choose(response([0.5, 0.01, None]), 3, random.Random(1))
    assert [(d.output_position, weight) for d, weight in chosen] == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert choose(response([]), 3, random.Random(1)) == []
    first = Response([1, 2], "", [1, 1], False, [decision(1, 0.5, block_position=1)])
    assert choose(first, 3, random.Random(1)) == []  # no token stands before its block


def test_a_chosen_mismatch_stands_for_as_many_as_its_chance_says() -> None:
    """Counts are exact, chances go with doubt, and weighted sums are on average those over all mismatches."""
    probabilities: list[float | None] = [0.5, 0.001, 0.9, None, 0.2, 0.99, 0.5, 0.7]
    own, draws = response(probabilities), 20_000
    rng = random.Random(7)
    value = [3.0, -1.0, 2.0, 5.0, -4.0, 1.0, 0.5, 2.5]
    times, total = [0] * 8, 0.0
    weights: dict[int, float] = {}
    for _ in range(draws):
        chosen = choose(own, 3, rng)
        assert len(chosen) == 3
        for one, weight in chosen:
            times[one.output_position - 1] += 1
            total += weight * value[one.output_position - 1]
            weights[one.output_position - 1] = weight
    doubts = [1.0, LEAST_DOUBT, 0.36, 1.0, 0.64, LEAST_DOUBT, 1.0, 0.84]
    expected = [3 * doubt / sum(doubts) for doubt in doubts]
    assert [count / draws for count in times] == pytest.approx(expected, abs=0.015)
    assert [1 / weights[i] for i in range(8)] == pytest.approx(expected)
    assert total / draws == pytest.approx(sum(value), abs=0.15)


def test_what_is_certain_to_be_chosen_stands_for_itself() -> None:
    chosen = {
        one.output_position: weight
        for seed in range(200)
        for one, weight in choose(response([0.5, 0.5, 0.001, 0.001, 0.001]), 3, random.Random(seed))
    }
    assert chosen == {1: 1.0, 2: 1.0, **dict.fromkeys((3, 4, 5), pytest.approx(3.0))}


def test_a_greedy_branch_needs_no_random_numbers_and_a_sampled_one_gets_those_of_its_block() -> None:
    own = response([0.5] * 6)
    at = decision(9, 0.5, block_position=3)
    greedy = branch_request(Request([1, 2], 40, seed=5), own, at, keep=True)
    assert greedy.prompt == [1, 2, *own.tokens[:5]]
    assert greedy.extra["cospec_branch"] == {"written": 5, "overrides": 0, "decided_at": 9, "keep": True}
    sampled = branch_request(Request([1, 2], 40, seed=5, temperature=0.7, top_p=0.9), own, at, keep=False, reseed=3)
    assert (sampled.temperature, sampled.top_p, sampled.seed, sampled.max_tokens) == (0.7, 0.9, 5, 35)
    assert sampled.extra["cospec_branch"] == {
        "written": 5, "overrides": 0, "decided_at": 9, "keep": False, "first_token": own.tokens[5],
        "generator": b"state", "reseed": 3,
    }  # fmt: skip
