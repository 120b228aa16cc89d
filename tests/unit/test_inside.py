"""Speeds from engines that take turns: which batches are asked, and what their times add up to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scripts import benchmark

from vllm_cospec.errors import ConfigError

inside = benchmark("inside")


def batch(k: int, mode: str, number: int, seconds: float, tokens: list[int], steps: list[int]) -> Any:
    n = len(tokens)
    return inside.TimedBatch(n, k, mode, number, seconds, [1.0] * n, [seconds] * n, tokens, steps, [1.0, 0.0][:n])


def test_a_round_asks_sixteen_problems_of_each_load_and_no_two_loads_the_same() -> None:
    found = {
        (turn, load): list(inside.shares(turn, load, place, 3))
        for turn in range(2)
        for place, load in enumerate((1, 4, 16))
    }
    assert [number for number, _ in found[0, 4] + found[1, 4]] == list(range(8))
    assert found[1, 16] == [(1, range(80, 96))]
    asked = [problem for own in found.values() for _, problems in own for problem in problems]
    assert sorted(asked) == list(range(96))


def test_speeds_are_sums_and_a_mode_is_compared_on_the_batches_both_answered() -> None:
    rows = inside.rows_of(
        [
            batch(0, "target", 0, 9.0, [4, 5], [4, 5]),
            batch(4, "standard", 0, 4.0, [4, 5], [3, 2]),
            batch(4, "standard", 1, 2.0, [6, 5], [2, 2]),
            batch(4, "learned", 1, 2.0, [3, 5], [2, 2]),
            batch(4, "learned", 0, 3.0, [6, 4], [2, 2]),
        ]
    )
    target, learned, standard = rows
    assert (target["mode"], learned["mode"], standard["mode"]) == ("target", "learned", "standard")
    assert target["tokens_per_s"] == 1.0
    assert not any(name.endswith(("target", "standard")) for name in target)
    assert learned["num_answers"] == 4
    assert learned["tokens_per_s"] == pytest.approx(18 / 5)
    assert learned["answers_per_s"] == pytest.approx(4 / 5)
    # behind the first tokens: 14 of them in 2 x (2 + 1) seconds; standard: 16 in 2 x (3 + 1)
    assert learned["tokens_behind_first_per_s"] == pytest.approx(14 / 6)
    assert learned["tokens_behind_first_times_standard"] == pytest.approx((14 / 6) / (16 / 8))
    assert learned["tokens_times_standard"] == pytest.approx((18 / 5) / (20 / 6))
    assert learned["tokens_times_target"] == pytest.approx((10 / 3) / 1)  # of batch 0 alone
    assert learned["answers_times_standard_ci95"] is None  # of two batches
    assert learned["acceptance_length"] == pytest.approx(14 / 4)
    assert learned["accuracy"] == 0.5
    assert learned["ttft_ms_p50"] == 1000


def test_an_interval_lies_between_the_batches_quotients() -> None:
    theirs = [batch(4, "standard", number, 4.0, [9], [3]) for number in range(6)]
    ours = [batch(4, "learned", number, 2.0 if number % 2 else 4.0, [9], [3]) for number in range(6)]
    found, interval = inside.times(ours, theirs, inside.whole)
    assert found == pytest.approx(24 / 18)
    assert interval is not None
    assert 1 <= interval[0] < found < interval[1] <= 2
    mean, around = inside.speed(ours, inside.answers)
    assert mean == pytest.approx(6 / 18)
    assert around is not None
    assert 1 / 4 <= around[0] < mean < around[1] <= 1 / 2


def test_accuracies_of_many_more_lines_can_be_drawn() -> None:
    modes = {
        "strict": {"accuracy": 0.1, "accuracy_ci95": [0.0, 0.2], "more": 1},
        "text: learned(threshold=0.5)": {"accuracy": 0.3, "accuracy_ci95": [0.2, 0.4]},
    }
    answered = {"test": {"modes": modes}}
    for mode in ("target", "standard"):
        assert inside.accuracy_of(mode, answered) == {"accuracy": 0.1, "accuracy_ci95": [0.0, 0.2]}
    assert inside.accuracy_of("learned(threshold=0.5)", answered)["accuracy"] == 0.3
    with pytest.raises(ConfigError, match=r"^--accuracy: the file has no answers of 'learned'; ask for them"):
        inside.accuracy_of("learned", answered)


def test_what_was_measured_is_read_again_and_another_run_keeps_off_it(tmp_path: Path) -> None:
    about = {"modes": ["standard"], "seed": 1}
    assert inside.read(tmp_path / "work", about) == []
    one = batch(4, "standard", 0, 4.0, [4], [3])
    line = json.dumps([asdict(one)]) + "\n"
    (tmp_path / "work" / "batches.jsonl").write_text(line + line[:30])  # of the second a kill left a part
    assert inside.read(tmp_path / "work", about) == [one]
    assert (tmp_path / "work" / "batches.jsonl").read_text() == line
    with pytest.raises(ConfigError, match=r"^--work: .* holds batches with other seed; choose another directory"):
        inside.read(tmp_path / "work", {**about, "seed": 2})
