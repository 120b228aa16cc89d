"""Every acceptance rule against a scalar statement of it, written from the rule's source and not from its code.

A rule computes in float32 from floored logarithms, the statements below in float64 from probabilities. The two may
disagree where a quantity lies on its threshold, so each statement returns a *margin*, positive where the draft is kept,
and rows whose margin is below ``MARGIN`` are not compared. Exact ties are the one boundary with a meaning of its own
(equal logits give bit-equal probabilities); they are tested by themselves.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import INF, MARGIN, agrees, entropy, logs, mismatch_rows, mismatches, one, order, probabilities, quick

from vllm_cospec.kernels import UNLIMITED, policies
from vllm_cospec.kernels.batch import Batch, Requests
from vllm_cospec.kernels.cpu import rule, verify_batch
from vllm_cospec.kernels.policies import Cascade, Fly, Kl, Mars, RelaxedTopK, Strict, Threshold, Typical
from vllm_cospec.kernels.statistics import LOGPROB_FLOOR

# strict


@quick
@given(mismatch_rows())
def test_strict_keeps_nothing(rows: list[tuple[Any, ...]]) -> None:
    assert not Strict().keep(mismatches(rows)).any()


# typical


@quick
@given(mismatch_rows(), st.one_of(st.floats(0, 1), st.just(1.0)), st.floats(0, 2))
def test_typical_keeps_above_the_entropy_dependent_threshold(
    rows: list[tuple[Any, ...]], epsilon: float, delta: float
) -> None:
    def statement(target: list[float], draft: list[float], d: int) -> float:
        p = probabilities(target)
        return p[d] - min(epsilon, delta * math.exp(-entropy(p)))

    agrees(Typical(posterior_threshold=epsilon, posterior_alpha=delta), rows, statement)


def test_typical_by_hand() -> None:
    typical = Typical()
    assert (typical.posterior_threshold, typical.posterior_alpha) == (0.09, 0.3)
    # Four equal tokens: H = log 4, so the threshold is min(0.09, 0.3 / 4 = 0.075), and p = 0.25 exceeds it.
    assert typical.keep(one([0.0] * 4, 3)).tolist() == [True]
    # p(d) = 0.08 of a nearly certain row: exp(-H) is 0.76, so 0.09 decides.
    assert typical.keep(one(logs(0.92, 0.08), 1)).tolist() == [False]
    assert typical.keep(one(logs(0.90, 0.10), 1)).tolist() == [True]
    # H = log(2) / 2 + log(10) / 2, so exp(-H) = 20 ** -0.5 = 0.2236, and delta decides about p(d) = 0.1.
    row = one(logs(0.5, 0.1, 0.1, 0.1, 0.1, 0.1), 3)
    assert Typical(posterior_threshold=1, posterior_alpha=0.43).keep(row).tolist() == [True]  # 0.0962
    assert Typical(posterior_threshold=1, posterior_alpha=0.46).keep(row).tolist() == [False]  # 0.1029


# relaxed_topk


@quick
@given(mismatch_rows(), st.integers(2, 10), st.floats(0.01, 1))
def test_relaxed_topk_keeps_close_tokens_among_the_first(rows: list[tuple[Any, ...]], top_n: int, delta: float) -> None:
    def statement(target: list[float], draft: list[float], d: int) -> float:
        p = probabilities(target)
        return p[d] - (max(p) - delta) if d in order(target)[:top_n] else -INF

    agrees(RelaxedTopK(top_n=top_n, delta=delta), rows, statement)


@quick
@given(mismatch_rows(), st.integers(1, 10), st.floats(0, 1))
def test_relaxed_topk_is_strict_at_one_token_or_no_distance(
    rows: list[tuple[Any, ...]], top_n: int, delta: float
) -> None:
    assert not RelaxedTopK(top_n=1, delta=delta).keep(mismatches(rows)).any()
    assert not RelaxedTopK(top_n=top_n, delta=0).keep(mismatches(rows)).any()


def test_relaxed_topk_counts_ties_by_index() -> None:
    row = [1.0, 1.0, 1.0, 1.0]
    kept = [RelaxedTopK(top_n=2, delta=0.5).keep(one(row, d)).item() for d in range(4)]
    assert kept == [True, True, False, False]


def test_relaxed_topk_ranks_exactly_far_down_a_large_vocabulary() -> None:
    # The statistic is log1p(rank) in float32, whose spacing at 1e5 is a tenth of the distance of two ranks.
    target = torch.arange(128_256, 0, -1.0).mul_(1e-6).tolist()  # nearly flat, so that only the rank can refuse
    for rank in (99_998, 99_999, 100_000, 100_001):
        assert RelaxedTopK(top_n=100_000, delta=1).keep(one(target, rank)).item() == (rank < 100_000)


# threshold


@quick
@given(mismatch_rows(), st.floats(0.01, 1), st.floats(0.05, 1), st.data())
def test_threshold_keeps_above_single_or_by_the_scaled_coin(
    rows: list[tuple[Any, ...]], single: float, acc: float, data: Any
) -> None:
    context = st.lists(st.floats(0, 1, width=32), min_size=len(rows), max_size=len(rows))
    ratio = [2 * r for r in data.draw(context)]
    uniform = data.draw(context)

    def statement(target: list[float], draft: list[float], d: int, acceptance_ratio: float, uniform: float) -> float:
        # A mismatch of a sampled request: strict verification has rejected it, so u > p(d) / q(d), and at 1 nothing
        # more can pass. A ratio of 0 is the mark of greedy requests, to which the coin does not apply.
        by_probability = probabilities(target)[d] - single if single < 1 else -INF
        coin = min(1, acceptance_ratio) / acc - uniform if acc < 1 and acceptance_ratio > 0 else -INF
        # The kept side of either is enough; where one is on the edge and the other refuses, the row is not clear.
        return max(by_probability, coin)

    agrees(Threshold(single=single, acc=acc), rows, statement, acceptance_ratio=ratio, uniform=uniform)


@quick
@given(mismatch_rows(), st.floats(0, 1, width=32))
def test_threshold_is_strict_at_one(rows: list[tuple[Any, ...]], ratio: float) -> None:
    # Saturated rows, whose p(d) rounds to 1, are among these. A mismatch has u > ratio, or it would be none.
    uniform = float(np.nextafter(np.float32(ratio), np.float32(2)))
    sampled = mismatches(rows, acceptance_ratio=[ratio] * len(rows), uniform=[uniform] * len(rows))
    assert Threshold() == Threshold(single=1.0, acc=1.0)
    assert not Threshold().keep(sampled).any()
    assert not Threshold().keep(mismatches(rows)).any()


@quick
@given(mismatch_rows(), st.floats(0.01, 0.99))
def test_threshold_acc_does_not_touch_greedy_requests(rows: list[tuple[Any, ...]], acc: float) -> None:
    assert not Threshold(acc=acc).keep(mismatches(rows)).any()


# cascade


@quick
@given(mismatch_rows(), st.floats(0, 0.999))
def test_cascade_keeps_within_a_share_of_the_best(rows: list[tuple[Any, ...]], alpha: float) -> None:
    def statement(target: list[float], draft: list[float], d: int) -> float:
        p = probabilities(target)
        return p[d] - max(p) * (1 - alpha)

    agrees(Cascade(alpha=alpha), rows, statement)


@quick
@given(mismatch_rows())
def test_cascade_keeps_only_ties_at_zero_and_everything_at_one(rows: list[tuple[Any, ...]]) -> None:
    # d either shares the maximum, then both sides are the same float, or lies so far below that float32 can tell.
    kept = Cascade(alpha=0).keep(mismatches(rows))
    for (target, _, d), keep in zip(rows, kept.tolist(), strict=True):
        p = probabilities(target)
        if target[d] == max(target) or max(p) - p[d] > MARGIN:
            assert keep == (target[d] == max(target))
    assert Cascade(alpha=1).keep(mismatches(rows)).all()


# mars


@quick
@given(mismatch_rows(), st.floats(0, 1))
def test_mars_keeps_a_second_choice_of_nearly_the_same_logit(rows: list[tuple[Any, ...]], ratio: float) -> None:
    def statement(target: list[float], draft: list[float], d: int) -> float:
        best, second = order(target)[:2]
        if d != second or target[best] <= 0:
            return -INF
        return target[d] / target[best] - ratio

    agrees(Mars(ratio=ratio), rows, statement)


@pytest.mark.parametrize("best", [0.0, -1.0, -1e4])
def test_mars_is_strict_where_the_best_logit_is_not_positive(best: float) -> None:
    # Below zero the ratio of the logits is above 1 for *worse* tokens.
    for ratio in (0.0, 0.5, 1.0):
        assert not Mars(ratio=ratio).keep(one([best, best - 0.5, best - 1], 1)).any()
        assert not Mars(ratio=ratio).keep(one([best, best, best - 1], 1)).any()


def test_mars_by_hand() -> None:
    mars = Mars()
    assert mars.ratio == 0.9
    assert mars.keep(one([10.0, 9.5, 0.0], 1)).tolist() == [True]
    assert mars.keep(one([10.0, 8.5, 0.0], 1)).tolist() == [False]
    assert mars.keep(one([10.0, 9.9, 9.8], 2)).tolist() == [False]  # the third choice
    assert mars.keep(one([10.0, 9.5, 0.0], 0)).tolist() == [False]  # the first, a mismatch of a sampled request
    assert mars.keep(one([10.0, 10.0, 0.0], 1)).tolist() == [True]  # a tie: the higher index is the second choice
    assert mars.keep(one([10.0, 10.0, 0.0], 0)).tolist() == [False]
    assert Mars(ratio=0).keep(one([10.0, -INF, -INF], 1)).tolist() == [False]


# fly


@quick
@given(mismatch_rows(), st.integers(1, 4), st.floats(0, 2), st.integers(1, 6), st.integers(0, 7), st.integers(0, 7))
def test_fly_keeps_where_unsure_and_the_next_drafts_are_accepted(
    rows: list[tuple[Any, ...]], top_k: int, threshold: float, window: int, run: int, remaining: int
) -> None:
    run = min(run, remaining)  # no more drafts can be accepted than there are
    policy = Fly(entropy_top_k=top_k, entropy_threshold=threshold, window=window)
    kept = policy.keep(mismatches(rows, natively_accepted_after=run, block_remaining=remaining)).tolist()
    for (target, _, _), keep in zip(rows, kept, strict=True):
        margin = entropy(sorted(probabilities(target), reverse=True)[:top_k]) - threshold
        if run < window:
            assert not keep
        elif abs(margin) > MARGIN:
            assert keep == (margin > 0)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_fly_window_over_every_pattern_of_acceptance(window: int) -> None:
    # Flat rows are as unsure as can be, so that the window alone decides. One request per pattern of 5 positions.
    patterns = [[bool(bits >> i & 1) for i in range(5)] for bits in range(32)]
    count, vocabulary = len(patterns), 4
    logits = torch.zeros(count * 5, vocabulary)
    batch = Batch(
        draft_tokens=torch.ones(count * 5, dtype=torch.int64),
        num_draft_tokens=np.full(count, 5),
        accepted=torch.tensor(patterns).flatten(),
        target_tokens=torch.full((count * 5,), 2),
        bonus_tokens=torch.full((count,), 3),
        raw_target_logits=logits,
        processed_target_logits=logits,
        raw_argmax=logits.argmax(dim=-1),
        draft_logits=None,
        num_speculative_tokens=5,
        max_draft_tokens=5,
        requests=Requests(
            arbitrated=np.ones(count, bool),
            junk=np.zeros(count, bool),
            output_position=np.zeros(count, np.int64),
            overrides_so_far=np.zeros(count, np.int64),
            max_overrides=np.full(count, UNLIMITED),
            exact_tokens=np.zeros(count, np.int64),
            threshold=np.zeros(count, np.float32),
            regret_so_far=np.zeros(count),
            max_regret=np.full(count, np.inf),
        ),
    )
    policy = Fly(window=window)
    result = verify_batch(batch, rule(policy))

    for accepted, emitted in zip(patterns, result.output.tolist(), strict=True):
        expected = []
        for i in range(5):
            following = accepted[i + 1 : i + 1 + window]
            if not accepted[i] and not (len(following) == window and all(following)):
                expected.append(2)
                break
            expected.append(1)
        else:
            expected.append(3)
        assert emitted == expected + [-1] * (6 - len(expected)), accepted


def test_fly_defaults_and_needs_a_resolved_window() -> None:
    policy = Fly()
    assert (policy.entropy_top_k, policy.entropy_threshold, policy.window) == (3, 0.3, None)
    with pytest.raises(ValueError, match="window"):
        policy.keep(one([0.0, 0.0], 1))


def test_fly_takes_the_entropy_of_the_first_tokens_without_renormalising() -> None:
    # Two tokens of probability 0.1: 0.461 nats as they stand, 0.693 if they were renormalised.
    row = mismatches([(logs(*[0.1] * 10), [0.0] * 10, 1)], natively_accepted_after=1, block_remaining=1)
    assert Fly(entropy_top_k=2, entropy_threshold=0.45, window=1).keep(row).tolist() == [True]
    assert Fly(entropy_top_k=2, entropy_threshold=0.47, window=1).keep(row).tolist() == [False]


# kl


@quick
@given(mismatch_rows(), st.one_of(st.floats(0, 3), st.floats(0, 99)))
def test_kl_trusts_a_draft_that_resembles_an_unsure_target(rows: list[tuple[Any, ...]], max_kl: float) -> None:
    def statement(target: list[float], draft: list[float], d: int) -> float:
        p, q = probabilities(target), probabilities(draft)

        def log(x: float) -> float:
            # The schema floors logarithms, so that a divergence is finite where the target rules a token out.
            return max(math.log(x), LOGPROB_FLOOR) if x > 0 else LOGPROB_FLOOR

        divergence = min(max(sum(b * (log(b) - log(a)) for a, b in zip(p, q, strict=True)), 0), -LOGPROB_FLOOR)
        return min(max_kl - divergence, 0.9 - max(p))

    agrees(Kl(max_kl=max_kl), rows, statement)


def test_kl_by_hand() -> None:
    # KL = 1/4 log 1/2 + 1/2 log 2 = 1/4 log 2 = 0.173
    row = one(logs(0.5, 0.25, 0.25), 2, draft=logs(0.25, 0.25, 0.5))
    assert Kl(max_kl=0.18).keep(row).tolist() == [True]
    assert Kl(max_kl=0.17).keep(row).tolist() == [False]
    assert Kl(max_kl=99).keep(one(logs(0.91, 0.09), 1)).tolist() == [False]  # a sure target is never overruled
    assert Kl.needs_draft_logits
    needing = {name for name in policies.policy_names() if policies.policy_class(name).needs_draft_logits}
    assert needing == {"kl", "mixture", "fsd"}
