"""Units done in this process come back as a pool's do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from vllm_cospec.training.rollout.in_process import InProcess


@dataclass(frozen=True)
class Numbered:
    """A unit that has nothing but its number."""

    key: int


def noted(done: list[Any]) -> InProcess:
    def work(unit: Numbered, payload: Any) -> tuple[int, Any]:
        done.append((unit.key, payload))
        return unit.key, payload

    return InProcess(work)


def test_results_come_in_the_order_in_which_they_are_asked_for() -> None:
    done: list[Any] = []
    ticks: list[Any] = []
    pool = noted(done)
    pool.submit([Numbered(1), Numbered(2)], pool.put("a"))
    pool.submit([Numbered(3)], pool.put("b"))
    assert done == []  # nothing is done before somebody waits for it
    assert pool.collect([3, 1], ticks.append) == [[(3, "b")], [(1, "a")]]
    assert ticks == [[(3, "b")], [(1, "a")]]
    assert pool.collect([2]) == [[(2, "a")]]
    assert pool.set_aside == []


def test_what_a_unit_does_to_its_payload_stays_with_it() -> None:
    payload = {"weights": [1.0]}

    def work(unit: Numbered, given: dict[str, list[float]]) -> float:
        given["weights"][0] += unit.key
        return given["weights"][0]

    pool = InProcess(work)
    pool.submit([Numbered(1), Numbered(2)], pool.put(payload))
    assert pool.collect([1, 2]) == [[2.0], [3.0]]
    assert payload == {"weights": [1.0]}


def test_a_unit_that_nobody_submitted_or_that_was_collected_is_an_error() -> None:
    pool = noted([])
    pool.submit([Numbered(1)])
    pool.collect([1])
    with pytest.raises(KeyError):
        pool.collect([1])


def test_what_raises_in_a_unit_is_raised_to_who_waits() -> None:
    def work(unit: Numbered, payload: None) -> None:
        raise ValueError(f"unit {unit.key}")

    pool = InProcess(work)
    pool.submit([Numbered(7)])
    with pytest.raises(ValueError, match="unit 7"):
        pool.collect([7])
