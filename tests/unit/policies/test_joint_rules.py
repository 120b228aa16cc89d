"""Rules that weigh strict verification's own number, or both distributions together, against their scalar statements.

Written from the sources named in each section, as :mod:`test_rules` says.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import INF, MARGIN, agrees, entropy, logs, mismatch_rows, mismatches, one, probabilities, quick

from vllm_cospec.kernels.policies import Ears, Entropy, Fsd, Mixture

numbers = st.floats(2**-24, 1, width=32)  # what strict verification draws


def drawn(data: Any, rows: list[Any]) -> tuple[list[float], list[float]]:
    """Ratios of the two probabilities, and the numbers they were compared with."""
    several = st.lists(numbers, min_size=len(rows), max_size=len(rows))
    return [2 * ratio for ratio in data.draw(several)], data.draw(several)


# entropy: vllm-ascend, vllm_ascend/ops/triton/reject_sample.py, ENTROPY_VERIFY: a draft is accepted where
# q > 0 and p / q >= u * min(exp(-entropy * posterior_alpha), posterior_threshold); greedy requests go another way.


@quick
@given(mismatch_rows(), st.floats(0.05, 1), st.floats(0, 2), st.data())
def test_entropy_lets_the_number_count_for_less_where_the_target_is_unsure(
    rows: list[tuple[Any, ...]], threshold: float, alpha: float, data: Any
) -> None:
    ratio, uniform = drawn(data, rows)

    def statement(target: list[float], draft: list[float], d: int, acceptance_ratio: float, uniform: float) -> float:
        return acceptance_ratio - uniform * min(math.exp(-entropy(probabilities(target)) * alpha), threshold)

    policy = Entropy(posterior_threshold=threshold, posterior_alpha=alpha)
    agrees(policy, rows, statement, acceptance_ratio=ratio, uniform=uniform)


def test_entropy_by_hand() -> None:
    assert (Entropy().posterior_threshold, Entropy().posterior_alpha) == (0.95, 0.4)
    # Four equal tokens: exp(-0.4 log 4) is 0.574, so 0.5 passes for u = 0.87 and not for 0.88.
    row = mismatches([([0.0] * 4, [0.0] * 4, 1)] * 2, acceptance_ratio=[0.5, 0.5], uniform=[0.87, 0.88])
    assert Entropy().keep(row).tolist() == [True, False]
    # A sure target: 0.95 is left.
    row = mismatches([([99.0, 0.0], [0.0] * 2, 1)] * 2, acceptance_ratio=[0.5, 0.5], uniform=[0.52, 0.53])
    assert Entropy().keep(row).tolist() == [True, False]


# ears: arXiv 2512.13194 and vllm-ascend #7845: u is replaced by max(u - tolerance (1 - max p), eps of float32), and
# p / q >= it accepts; greedy requests do not go through it.


@quick
@given(mismatch_rows(), st.floats(0, 1), st.data())
def test_ears_forgives_a_share_of_the_targets_uncertainty(
    rows: list[tuple[Any, ...]], tolerance: float, data: Any
) -> None:
    ratio, uniform = drawn(data, rows)

    def statement(target: list[float], draft: list[float], d: int, acceptance_ratio: float, uniform: float) -> float:
        bound = uniform - tolerance * (1 - max(probabilities(target)))
        return acceptance_ratio - max(bound, torch.finfo(torch.float32).eps)

    agrees(Ears(tolerance=tolerance), rows, statement, acceptance_ratio=ratio, uniform=uniform)


def test_ears_by_hand() -> None:
    # max p = 0.4: half of 0.6 is forgiven, so a ratio of 0.2 passes for u = 0.49 and not for 0.51.
    rows = [(logs(0.1, 0.2, 0.3, 0.4), [0.0] * 4, 0)] * 3
    row = mismatches(rows, acceptance_ratio=[0.2, 0.2, 1e-9], uniform=[0.49, 0.51, 0.1])
    assert Ears(tolerance=0.5).keep(row).tolist() == [True, False, False]  # a ratio next to nothing never passes


@quick
@given(mismatch_rows(), st.floats(0, 1))
def test_what_goes_by_the_number_leaves_greedy_requests_strict(rows: list[tuple[Any, ...]], share: float) -> None:
    assert not Entropy(posterior_threshold=max(share, 0.01), posterior_alpha=9).keep(mismatches(rows)).any()
    assert not Ears(tolerance=share).keep(mismatches(rows)).any()


# mixture: transformers #45865 and #45979 (assistant_ensemble_weight, DIVERSED, arXiv 2604.07622): verify against
# v = w p + (1 - w) q; drawn drafts are accepted with probability min(1, v(d) / q(d)), greedy ones where argmax v = d.


def mixed(target: list[float], draft: list[float], w: float) -> list[float]:
    return [w * p + (1 - w) * q for p, q in zip(probabilities(target), probabilities(draft), strict=True)]


@quick
@given(mismatch_rows(), st.floats(0.01, 1))
def test_mixture_keeps_the_greedy_choice_of_the_mixture(rows: list[tuple[Any, ...]], weight: float) -> None:
    def statement(target: list[float], draft: list[float], d: int) -> float:
        v = mixed(target, draft, weight)
        return v[d] - max(x for i, x in enumerate(v) if i != d)

    agrees(Mixture(weight=weight), rows, statement)


@quick
@given(mismatch_rows(), st.floats(0.01, 1), st.data())
def test_mixture_keeps_a_drawn_token_with_the_mixtures_probability(
    rows: list[tuple[Any, ...]], weight: float, data: Any
) -> None:
    ratio, uniform = drawn(data, rows)

    def statement(target: list[float], draft: list[float], d: int, acceptance_ratio: float, uniform: float) -> float:
        q = 0.25  # whatever it is
        return (weight * acceptance_ratio * q + (1 - weight) * q) / q - uniform

    agrees(Mixture(weight=weight), rows, statement, acceptance_ratio=ratio, uniform=uniform)


def test_mixture_by_hand() -> None:
    # transformers' own examples
    row = mismatches([(logs(0.4, 0.3, 0.2, 0.1), logs(0.8, 0.1, 0.05, 0.05), 0)], [0.5], [0.6])
    assert Mixture(weight=0.7).keep(row).tolist() == [True]  # 0.65
    assert Mixture(weight=0.9).keep(row).tolist() == [False]  # 0.55
    row = one(logs(0.50, 0.49, 0.01), 1, draft=logs(0.10, 0.89, 0.01))
    assert Mixture(weight=0.5).keep(row).tolist() == [True]  # 0.69 against 0.30
    assert Mixture(weight=1.0).keep(row).tolist() == [False]
    # A third token may lead: neither model's first choice.
    row = one(logs(0.50, 0.0, 0.5 - 1e-3, 1e-3), 1, draft=logs(0.0, 0.51, 0.49, 0.0))
    assert Mixture(weight=0.5).keep(row).tolist() == [False]


# fsd: arXiv 2502.20704 and github.com/maxholsman/fsd (js_div, tv_div): a draft is accepted where the divergence of the
# two distributions is at most the threshold.


def js(p: list[float], q: list[float]) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, m) + kl(q, m)) / 2


@quick
@given(mismatch_rows(), st.floats(0, 1), st.sampled_from(["js", "tv"]))
def test_fsd_trusts_a_draft_that_resembles_the_target(
    rows: list[tuple[Any, ...]], most: float, divergence: str
) -> None:
    def statement(target: list[float], draft: list[float], d: int) -> float:
        p, q = probabilities(target), probabilities(draft)
        if divergence == "tv":
            return most - sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
        return most - js(p, q)

    agrees(Fsd(divergence=divergence, max_divergence=most), rows, statement)  # type: ignore[arg-type]


def test_fsd_by_hand() -> None:
    apart = one(logs(1.0, 0.0), 1, draft=logs(0.0, 1.0))  # the largest there is: log 2, and 1
    assert Fsd(max_divergence=math.log(2) + MARGIN).keep(apart).tolist() == [True]
    assert Fsd(max_divergence=math.log(2) - MARGIN).keep(apart).tolist() == [False]
    assert Fsd(divergence="tv", max_divergence=1).keep(apart).tolist() == [True]
    assert Fsd(divergence="tv", max_divergence=1 - MARGIN).keep(apart).tolist() == [False]
    row = one(logs(0.5, 0.25, 0.25), 2, draft=logs(0.25, 0.25, 0.5))
    assert Fsd(divergence="tv", max_divergence=0.26).keep(row).tolist() == [True]
    assert Fsd(divergence="tv", max_divergence=0.24).keep(row).tolist() == [False]
    assert Fsd(max_divergence=0).keep(one([1.0, -INF, 0.0], 1)).tolist() == [True]  # the same distribution twice


@pytest.mark.parametrize("rule", [Mixture(weight=0.5), Fsd(max_divergence=0.5)], ids=lambda rule: rule.policy)
def test_rules_over_both_distributions_read_the_drafts(rule: Any) -> None:
    target = logs(0.5, 0.4, 0.1)
    assert rule.keep(one(target, 1, draft=logs(0.3, 0.6, 0.1))).tolist() == [True]
    assert rule.keep(one(target, 1, draft=logs(0.01, 0.0, 0.99))).tolist() == [False]
