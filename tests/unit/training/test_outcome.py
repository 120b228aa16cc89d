"""One outcome, one comparison: figures worked out by hand, and a defined value where nothing was drafted or asked."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.outcome import Outcome, compare, table_of


def outcome(scores: list[float], first: int = 0, counts: Counts | None = None, seconds: float = 2.0) -> Outcome:
    n = len(scores)
    return Outcome(
        np.arange(first, first + n), np.array(scores), np.full(n, 10), np.arange(n) == 0, counts or Counts(), seconds
    )


def test_counts_are_read_by_vllms_names_and_add_up() -> None:
    before = Counts.of_metrics({"vllm:spec_decode_num_drafts": 2, "other": 5})
    after = Counts.of_metrics(
        {
            "vllm:spec_decode_num_drafts": 12.0,
            "vllm:spec_decode_num_accepted_tokens": 25.0,
            "vllm:spec_decode_num_accepted_tokens_per_pos[1]": 5.0,
            "vllm:spec_decode_num_accepted_tokens_per_pos[0]": 8.0,
            "vllm:spec_decode_num_accepted_tokens_per_pos[10]": 1.0,
            "vllm:cospec_num_mismatches": 8.0,
            "vllm:cospec_num_overrides": 2.0,
            "vllm:cospec_num_overrides_per_pos[0]": 2.0,
        }
    )
    found = after - before
    assert found == Counts(10, 25, (8, 5, 1), 8, 2)
    assert found.acceptance_length == 3.5
    assert found.acceptance_per_position == [0.8, 0.5, 0.1]
    assert found.override_rate == 0.25
    assert found + Counts(10, 5, (2,)) == Counts(20, 30, (10, 5, 1), 8, 2)


def test_only_delivered_tokens_are_accepted_ones() -> None:
    # three blocks of up to seven tokens after the prompt's own, of which the last was cut short by the response's end
    assert Counts(3, 18).as_delivered(tokens=1 + 15, responses=1) == Counts(3, 12)
    assert Counts(3, 18).as_delivered(tokens=1 + 15, responses=1).acceptance_length == 5.0
    # one hundred responses of two tokens whose blocks were accepted whole: one token per step
    assert Counts(100, 546).as_delivered(tokens=200, responses=100).acceptance_length == 1.0
    # what no block explains came in steps without drafts: (30 - 1) tokens, 21 of them in 3 blocks, 8 steps alone
    assert Counts(3, 18).as_delivered(tokens=30, responses=1) == Counts(11, 18)
    assert Counts().as_delivered(tokens=30, responses=1) == Counts()


def test_nothing_drafted_is_one_token_per_step_everywhere() -> None:
    for counts in (Counts(), Counts.of_metrics({}), Counts() + Counts()):
        assert (counts.acceptance_length, counts.acceptance_per_position, counts.override_rate) == (1.0, [], 0.0)
    figures = outcome([1.0, 0.0]).figures()
    assert (figures["acceptance_length"], figures["override_rate"], figures["num_overrides"]) == (1.0, 0.0, 0)


def test_figures_are_those_of_the_answers() -> None:
    figures = outcome([1.0, 0.0, 1.0, 1.0], counts=Counts(4, 8, (4, 4), 5, 1)).figures()
    interval = binomtest(3, 4).proportion_ci(method="wilson")
    assert figures["accuracy"] == 0.75
    assert figures["accuracy_ci95"] == pytest.approx([interval.low, interval.high])
    assert (figures["tokens_per_s"], figures["requests_per_s"]) == (20.0, 2.0)
    assert (figures["mean_output_tokens"], figures["length_cap_hits"]) == (10.0, 1)
    assert (figures["acceptance_length"], figures["acceptance_per_position"]) == (3.0, [1.0, 1.0])
    assert (figures["num_mismatches"], figures["num_overrides"], figures["override_rate"]) == (5, 1, 0.2)
    assert figures["ttft_ms_p50"] is figures["tpot_ms_p50"] is figures["itl_ms_p99"] is None


def test_times_of_streamed_answers_are_percentiles_in_milliseconds() -> None:
    streamed = Outcome(
        np.arange(3), np.ones(3), np.array([3, 1, 2]), np.zeros(3, bool), Counts(), 1.0,
        [[0.1, 0.2, 0.4], [0.3], []],
    )  # fmt: skip
    figures = streamed.figures()
    assert figures["ttft_ms_p50"] == pytest.approx(200)  # 100 and 300; an answer without text has no first
    assert figures["tpot_ms_p50"] == pytest.approx(150)  # (0.4 - 0.1) / 2
    assert figures["itl_ms_p99"] == pytest.approx(199)


def test_a_problem_counts_once_as_it_was_answered_first() -> None:
    merged = Outcome.merge([outcome([0.0, 1.0]), outcome([1.0, 1.0]), outcome([1.0], first=2)])
    figures = merged.figures()
    assert (figures["num_problems"], figures["accuracy"]) == (3, pytest.approx(2 / 3))
    assert merged.seconds == 6.0
    assert figures["tokens_per_s"] == pytest.approx(50 / 6)


def test_a_comparison_is_paired_on_the_common_problems() -> None:
    ours, theirs = outcome([1.0, 1.0, 0.0, 1.0]), outcome([0.0, 0.0, 1.0], first=1)
    found = compare(ours, theirs)  # problems 1, 2 and 3: 1 against 0, 0 against 0, 1 against 1
    assert (found["gained"], found["lost"], found["p_value"]) == (1, 0, 1.0)
    assert found["difference"] == pytest.approx(1 / 3)
    assert found["ci95"][0] < 0 < found["difference"] < found["ci95"][1]
    assert compare(outcome([1.0]), outcome([1.0], first=5))["p_value"] == 1.0  # nothing in common


def test_rows_are_paired_with_the_baseline_alone() -> None:
    rows = table_of({"target": outcome([0.0, 1.0]), "learned": outcome([1.0, 1.0])}, "target")
    assert [row["mode"] for row in rows] == ["target", "learned"]
    assert rows[0]["paired_vs_target"] is None
    assert rows[1]["paired_vs_target"]["gained"] == 1
    assert all(row["paired_vs_target"] is None for row in table_of({"learned": outcome([1.0])}, "target"))


def test_scores_between_right_and_wrong_have_an_interval_too() -> None:
    figures = outcome([0.25, 0.75] * 50).figures()
    low, high = figures["accuracy_ci95"]
    assert 0.4 < low < 0.5 < high < 0.6
