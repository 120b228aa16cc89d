"""The drift test: no gain on calibrated traffic, few requests until other traffic is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from drift_traffic import some, traffic
from pydantic import ValidationError

from vllm_cospec.drift import (
    FIGURES,
    LIMIT,
    SCORE_EDGES,
    STAKES,
    DriftDetector,
    Finished,
    Range,
    Traffic,
    bet,
    figure_name,
    histogram,
    standardised,
)
from vllm_cospec.training.measure.traffic import traffic_of


@pytest.fixture(scope="module")
def expected() -> Traffic:
    return traffic_of(some(1000, seed=1))


def test_ten_thousand_calibrated_requests_raise_no_alarm_and_other_ones_are_noticed_within_a_hundred(
    expected: Traffic,
) -> None:
    detector = DriftDetector(expected)
    for request in some(10_000, seed=2):
        assert not detector.add(request)
    assert detector.evidence < LIMIT / 10
    after = next(i for i, request in enumerate(traffic(seed=3, mismatch_rate=0.25), 1) if detector.add(request))
    assert after <= 100
    assert "mismatches per token above" in detector.reason()


@pytest.mark.parametrize(
    "other",
    [{"mismatch_rate": 0.02}, {"mismatch_rate": 0.3}, {"keep_rate": 0.9}, {"keep_rate": 0.02}, {"tokens": 15}],
    ids=str,
)
def test_each_kind_of_change_is_noticed_within_a_hundred(expected: Traffic, other: dict[str, float]) -> None:
    for seed in range(5):
        detector = DriftDetector(expected)
        assert any(detector.add(request) for request in some(100, seed=seed, **other))


def test_nobody_gains_on_average_where_the_means_are_at_the_ends_of_their_ranges() -> None:
    rng, n, streams = np.random.default_rng(4), 40, 20_000
    mean = np.linspace(0.05, 0.95, FIGURES)
    capital = np.zeros((streams, 2, len(STAKES), FIGURES))
    for _ in range(n):
        capital = bet(capital, (rng.random((streams, FIGURES)) < mean).astype(float), mean, mean)
    # Of heavy tails the mean is told by the small stakes; those alone are close to it in so few streams.
    assert capital[:, :, 0].mean(axis=0) == pytest.approx(np.full((2, FIGURES), n), rel=0.1)


def test_a_mean_inside_its_range_loses() -> None:
    rng, n = np.random.default_rng(5), 200
    capital = np.zeros((500, 2, len(STAKES), FIGURES))
    for _ in range(n):
        figures = rng.random((500, FIGURES))
        capital = bet(capital, figures, np.full(FIGURES, 0.45), np.full(FIGURES, 0.55))
    assert capital.mean() < 0.8 * n


def test_the_first_request_of_a_new_gambler_counts() -> None:
    low = high = np.full(FIGURES, 0.5)
    once = bet(np.zeros((2, len(STAKES), FIGURES)), np.ones(FIGURES), low, high)
    assert once[0, :, 0] == pytest.approx(1 + STAKES)
    assert once[1, :, 0] == pytest.approx(1 - STAKES)


def test_a_request_without_a_mismatch_says_nothing_about_overrides_and_scores() -> None:
    figures = Finished(20, 0, 0, histogram(np.zeros(0))).figures()
    assert figures[:2].tolist() == [20, 0]
    assert np.isnan(figures[2:]).all()
    low = high = np.full(FIGURES, 0.5)
    after = bet(np.zeros((2, len(STAKES), FIGURES)), figures, low, high)
    assert (after[:, :, 2:] == 0).all()
    assert (after[1, :, 1] > 1).all()


def test_a_request_that_was_given_up_says_nothing_about_the_length_of_responses() -> None:
    scores = histogram(np.array([0.2, 0.7]))
    whole, given_up = Finished(20, 2, 1, scores).figures(), Finished(20, 2, 1, scores, whole=False).figures()
    assert np.isnan(given_up[0])
    assert given_up[1:].tolist() == whole[1:].tolist()


def test_every_score_falls_into_one_bin_and_every_figure_has_a_name() -> None:
    scores = np.array([0.0, 1e-5, 0.3, 0.5, 0.9999, 1.0])
    counts = histogram(scores)
    assert counts.sum() == len(scores)
    assert (counts[0], counts[1], counts[-1]) == (1, 1, 2)
    assert len(counts) == len(SCORE_EDGES) + 1 == FIGURES - 3
    names = [figure_name(i) for i in range(FIGURES)]
    assert len(set(names)) == FIGURES
    assert names[3] == "share of scores from 0 to 1e-05"
    assert names[-1] == "share of scores from 0.9999 to 1"


def test_an_alarm_stays_until_it_is_reset(expected: Traffic) -> None:
    detector = DriftDetector(expected)
    for request in some(200, seed=6, mismatch_rate=0.3):
        detector.add(request)
    assert detector.alarm
    assert all(detector.add(request) for request in some(50, seed=7))
    detector.reset()
    assert not detector.alarm
    assert not any(detector.add(request) for request in some(50, seed=7))


def test_the_ranges_hold_the_true_means() -> None:
    everything = np.array([request.figures() for request in some(50_000, seed=8)])
    for seed in range(8):
        for own, figures in zip(traffic_of(some(300, seed=100 + seed)).ranges, everything.T, strict=True):
            assert own.low <= np.nanmean(standardised(figures, own.mean, own.deviation)) <= own.high


def test_a_figure_calibration_never_saw_says_nothing() -> None:
    strict_only = [Finished(20, 0, 0, histogram(np.zeros(0))) for _ in range(50)]
    seen = traffic_of(strict_only)
    assert (seen.overrides_per_mismatch.low, seen.overrides_per_mismatch.high) == (0, 1)


def test_what_calibration_saw_survives_json(expected: Traffic) -> None:
    assert Traffic.model_validate_json(expected.model_dump_json()) == expected


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater"):
        Range(mean=0.5, deviation=0.1, low=0.7, high=0.6)


def test_figures_are_compared_in_deviations_from_their_mean() -> None:
    found = standardised(np.array([0.1, 0.3, -0.1, 0.1 + 1e6, np.nan]), 0.1, 0.2)
    assert found[:4] == pytest.approx([1 / 2, 1 / (1 + np.exp(-1)), 1 / (1 + np.e), 1])
    assert np.isnan(found[4])
    never_varied = standardised(np.array([0.0, 0.3]), 0.0, 0.0)
    assert never_varied == pytest.approx([0.5, 1])
