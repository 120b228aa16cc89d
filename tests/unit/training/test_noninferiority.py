"""The tests of a loss against a margin: exactness against enumeration, level and power by simulation."""

from __future__ import annotations

import bisect

import numpy as np
import pytest
from scipy.special import gammaln, xlogy

from vllm_cospec.training.measure.noninferiority import (
    betting_p_value,
    exact_p_value,
    loss_bound,
    p_value,
    score_statistic,
)


def enumerated_p_value(gained: int, lost: int, n: int, margin: float) -> float:
    """The definition: every table that speaks as strongly, its probability at the worst share gained."""
    gains, losses = np.meshgrid(np.arange(n + 1.0), np.arange(n + 1.0), indexing="ij")
    equal = n - gains - losses
    found = score_statistic(gained, lost, n, margin)
    region = (equal >= 0) & (score_statistic(gains, losses, n, margin) <= found + 1e-9)
    gains, losses, equal = gains[region], losses[region], equal[region]
    coefficient = gammaln(n + 1) - gammaln(gains + 1) - gammaln(losses + 1) - gammaln(equal + 1)
    worst = 0.0
    for share in np.linspace(0, (1 - margin) / 2, 400):
        rest = max(0.0, 1 - 2 * share - margin)
        logs = coefficient + xlogy(gains, share) + xlogy(losses, share + margin) + xlogy(equal, rest)
        worst = max(worst, float(np.exp(logs).sum()))
    return min(1.0, worst)


@pytest.mark.parametrize(("n", "margin"), [(12, 0.05), (30, 0.02), (30, 0.0), (40, 0.1)])
@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 1), (5, 2), (2, 5), (8, 3)])
def test_the_exact_p_value_is_the_enumerated_one(n: int, margin: float, gained: int, lost: int) -> None:
    expected = enumerated_p_value(gained, lost, n, margin)
    assert exact_p_value(gained, lost, n, margin) == pytest.approx(expected, rel=2e-3)


def outcomes(n: int, gained: float, lost: float, seed: int, sets: int) -> np.ndarray:
    """Counts of pairs gained, lost and equal, [sets, 3], where these are the true shares."""
    return np.random.default_rng(seed).multinomial(n, [gained, lost, 1 - gained - lost], size=sets)


def passed(counts: np.ndarray, n: int, margin: float) -> np.ndarray:
    """Which of the tables pass at 95 %, [sets]: the p-value grows with the statistic, so it is bisected."""
    statistics = score_statistic(counts[:, 0].astype(float), counts[:, 1].astype(float), n, margin)
    order = np.argsort(statistics)
    first = bisect.bisect_right(
        order, 0.05, key=lambda i: exact_p_value(int(counts[i, 0]), int(counts[i, 1]), n, margin)
    )
    found = np.zeros(len(counts), bool)
    found[order[:first]] = True
    return found


@pytest.mark.parametrize(("n", "share"), [(100, 0.01), (300, 0.05), (1000, 0.2)])
def test_a_loss_of_the_margin_passes_in_one_case_in_twenty_at_most(n: int, share: float) -> None:
    wrong = passed(outcomes(n, share, share + 0.02, seed=n, sets=20_000), n, 0.02).mean()
    assert 0.01 < wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20_000)


def test_equal_accuracy_passes_more_often_than_by_betting() -> None:
    counts = outcomes(1000, 0.02, 0.02, seed=5, sets=400)
    by_betting = []
    for gained, lost, equal in counts:
        differences = np.repeat([1.0, -1.0, 0.0], [gained, lost, equal])
        np.random.default_rng(int(gained)).shuffle(differences)
        by_betting.append(betting_p_value(differences, 0.01) <= 0.05)
    exact = passed(counts, 1000, 0.01).mean()
    assert exact > 0.4
    assert exact > np.mean(by_betting) + 0.1


@pytest.mark.parametrize("kind", ["rare heavy losses", "spread", "halves"])
def test_partial_credit_that_loses_the_margin_passes_in_one_case_in_twenty_at_most(kind: str) -> None:
    rng, passed, margin = np.random.default_rng(7), 0, 0.02
    for _ in range(600):
        if kind == "rare heavy losses":  # a t-test passes this too often: most samples hold too few of them
            differences = np.where(rng.random(200) < 0.03, -1.0, 0.01 / 0.97)
        elif kind == "spread":
            differences = rng.uniform(-0.3, 0.3 - 2 * margin, 200)
        else:
            differences = rng.choice([-0.5, 0.0, 0.5], 200, p=[0.14, 0.76, 0.10])
        assert differences.mean() < 1
        passed += betting_p_value(differences, margin) <= 0.05
    assert passed / 600 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)


def test_partial_credit_without_loss_passes() -> None:
    rng = np.random.default_rng(8)
    strict = rng.uniform(0, 1, 1000)
    ours = np.clip(strict + rng.normal(0.005, 0.05, 1000), 0, 1)
    assert p_value(ours, strict, 0.02) < 1e-3


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (9, 8), (4, 12), (30, 31)])
def test_the_bound_is_the_smallest_margin_that_is_rejected(gained: int, lost: int) -> None:
    equal = 200 - gained - lost
    ours = np.repeat([1.0, 0.0, 1.0], [gained, lost, equal])
    strict = np.repeat([0.0, 1.0, 1.0], [gained, lost, equal])
    bound = loss_bound(ours, strict, 0.9)
    assert bound > (lost - gained) / 200
    assert p_value(ours, strict, bound, 0.9) <= 0.1
    assert p_value(ours, strict, bound - 1e-4, 0.9) > 0.1
    assert all(p_value(ours, strict, bound * more, 0.9) <= 0.1 for more in (1.02, 1.2, 2.0))


def test_the_bound_of_equal_answers_shrinks_with_their_number() -> None:
    bounds = [loss_bound(np.ones(n), np.ones(n), 0.95) for n in (100, 1000)]
    assert bounds == pytest.approx([1 - 0.05 ** (1 / 100), 1 - 0.05 ** (1 / 1000)], abs=2e-4)


def test_a_large_loss_has_a_bound_and_no_margin_below_it() -> None:
    assert 0.5 < loss_bound(np.zeros(40), np.r_[np.ones(20), np.zeros(20)], 0.95) < 0.7
    assert loss_bound(np.zeros(5), np.ones(5), 0.95) == 1.0


@pytest.mark.parametrize("scores", [np.array([1.5]), np.array([-0.1]), np.array([np.nan]), np.zeros(0)])
def test_scores_without_a_bound_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1|at least one"):
        p_value(scores, scores, 0.01)
