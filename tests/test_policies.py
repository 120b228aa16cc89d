"""Every acceptance rule against a scalar statement of it, written from the rule's source and not from its code.

A rule computes in float32 from floored logarithms, the statements below in float64 from probabilities. The two may
disagree where a quantity lies on its threshold, so each statement returns a *margin*, positive where the draft is kept,
and rows whose margin is below ``MARGIN`` are not compared. Exact ties are the one boundary with a meaning of its own
(equal logits give bit-equal probabilities); they are tested by themselves.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from vllm_cospec import policies
from vllm_cospec.kernels.cpu import UNLIMITED, Batch, Requests, logit_statistics, top_k_entropy, verify_batch
from vllm_cospec.policies import (
    AnyPolicy,
    Cascade,
    Fly,
    Kl,
    Learned,
    Mars,
    Mismatches,
    Policy,
    Random,
    RelaxedTopK,
    Strict,
    Threshold,
    Typical,
)
from vllm_cospec.statistics import LOGPROB_FLOOR

INF = math.inf
MARGIN = 1e-4  # float32 probabilities are good to 1e-6, divergences of a few terms of up to 100 each to 3e-5

quick = settings(max_examples=60, deadline=None, derandomize=True)
TYPE_ADAPTER: TypeAdapter = TypeAdapter(AnyPolicy)


# Rows: (target logits, draft logits, draft token), all exactly representable in float32.


def logit_rows(size: int) -> st.SearchStrategy[list[float]]:
    """One row of logits: smooth, full of ties, with -inf, one-hot, or saturated. Never without a finite entry."""
    smooth = st.floats(-8, 8, width=32, allow_subnormal=False)  # no product of subnormals has a relative precision
    ties = st.integers(-2, 2).map(float)

    def row(entry: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
        return st.lists(entry, min_size=size, max_size=size)

    def one_hot(hot: int, others: float, value: float) -> list[float]:
        return [value if i == hot else others for i in range(size)]

    index = st.integers(0, size - 1)
    return st.one_of(
        row(smooth),
        row(ties),
        row(smooth.map(lambda x: x - 20)),  # no positive logit
        row(st.one_of(smooth, st.just(-INF))).filter(lambda r: max(r) > -INF),
        st.builds(one_hot, index, st.just(-INF), smooth),
        st.builds(one_hot, index, st.sampled_from([-1e4, 0.0, 5.0]), st.sampled_from([12.0, 1e4])),
    )


@st.composite
def mismatch_rows(draw: st.DrawFn) -> list[tuple[list[float], list[float], int]]:
    """Up to three rows of one vocabulary; d is any token, the target's argmax included."""
    size = draw(st.integers(2, 8))
    row = st.tuples(logit_rows(size), logit_rows(size), st.integers(0, size - 1))
    return draw(st.lists(row, min_size=1, max_size=3))


def mismatches(
    rows: list[tuple[list[float], list[float], int]],
    acceptance_ratio: list[float] | None = None,
    uniform: list[float] | None = None,
    natively_accepted_after: int = 0,
    block_remaining: int = 0,
) -> Mismatches:
    """Build what the CPU path hands to a policy, greedy unless told otherwise."""
    target, draft = torch.tensor([t for t, _, _ in rows]), torch.tensor([q for _, q, _ in rows])
    token, top = torch.tensor([d for _, _, d in rows]), target.argmax(dim=-1)
    statistics = torch.zeros(len(rows), 16)
    statistics[:, :10] = logit_statistics(target, draft, token, top)
    every = torch.arange(len(rows))
    return Mismatches(
        statistics=statistics,
        target_logit_draft=target[every, token],
        target_logit_top=target[every, top],
        draft_token=token,
        target_token=top,
        output_position=torch.zeros(len(rows), dtype=torch.int64),
        natively_accepted_after=torch.full((len(rows),), natively_accepted_after),
        block_remaining=torch.full((len(rows),), block_remaining),
        acceptance_ratio=torch.zeros(len(rows)) if acceptance_ratio is None else torch.tensor(acceptance_ratio),
        uniform=torch.ones(len(rows)) if uniform is None else torch.tensor(uniform),
        top_k_entropy=lambda k: top_k_entropy(target, k),
    )


def one(target: list[float], draft_token: int, draft: list[float] | None = None) -> Mismatches:
    return mismatches([(target, draft or target, draft_token)])


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p > 0 else -INF for p in probabilities]


# The scalar vocabulary of the statements.


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def entropy(ps: list[float]) -> float:
    return -sum(p * math.log(p) for p in ps if p > 0)


def order(logits: list[float]) -> list[int]:
    """Tokens from the most to the least likely; of equals the lower index comes first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def agrees(policy: Policy, rows: list, statement: Callable[..., float], **context: list[float]) -> None:
    """Check a policy against the margins of its statement, where they are clear."""
    kept = policy.keep(mismatches(rows, **context))
    assert kept.dtype == torch.bool
    assert kept.shape == (len(rows),)
    for i, (target, draft, token) in enumerate(rows):
        margin = statement(target, draft, token, **{name: values[i] for name, values in context.items()})
        if abs(margin) > MARGIN:
            assert bool(kept[i]) == (margin > 0), (target, draft, token, margin)


# strict


@quick
@given(mismatch_rows())
def test_strict_keeps_nothing(rows):
    assert not Strict().keep(mismatches(rows)).any()


# typical


@quick
@given(mismatch_rows(), st.one_of(st.floats(0, 1), st.just(1.0)), st.floats(0, 2))
def test_typical_keeps_above_the_entropy_dependent_threshold(rows, epsilon, delta):
    def statement(target, draft, d):
        p = probabilities(target)
        return p[d] - min(epsilon, delta * math.exp(-entropy(p)))

    agrees(Typical(posterior_threshold=epsilon, posterior_alpha=delta), rows, statement)


def test_typical_by_hand():
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
def test_relaxed_topk_keeps_close_tokens_among_the_first(rows, top_n, delta):
    def statement(target, draft, d):
        p = probabilities(target)
        return p[d] - (max(p) - delta) if d in order(target)[:top_n] else -INF

    agrees(RelaxedTopK(top_n=top_n, delta=delta), rows, statement)


@quick
@given(mismatch_rows(), st.integers(1, 10), st.floats(0, 1))
def test_relaxed_topk_is_strict_at_one_token_or_no_distance(rows, top_n, delta):
    assert not RelaxedTopK(top_n=1, delta=delta).keep(mismatches(rows)).any()
    assert not RelaxedTopK(top_n=top_n, delta=0).keep(mismatches(rows)).any()


def test_relaxed_topk_counts_ties_by_index():
    row = [1.0, 1.0, 1.0, 1.0]
    kept = [RelaxedTopK(top_n=2, delta=0.5).keep(one(row, d)).item() for d in range(4)]
    assert kept == [True, True, False, False]


def test_relaxed_topk_ranks_exactly_far_down_a_large_vocabulary():
    # The statistic is log1p(rank) in float32, whose spacing at 1e5 is a tenth of the distance of two ranks.
    target = torch.arange(128_256, 0, -1.0).mul_(1e-6).tolist()  # nearly flat, so that only the rank can refuse
    for rank in (99_998, 99_999, 100_000, 100_001):
        assert RelaxedTopK(top_n=100_000, delta=1).keep(one(target, rank)).item() == (rank < 100_000)


# threshold


@quick
@given(mismatch_rows(), st.floats(0.01, 1), st.floats(0.05, 1), st.data())
def test_threshold_keeps_above_single_or_by_the_scaled_coin(rows, single, acc, data):
    context = st.lists(st.floats(0, 1, width=32), min_size=len(rows), max_size=len(rows))
    ratio = [2 * r for r in data.draw(context)]
    uniform = data.draw(context)

    def statement(target, draft, d, acceptance_ratio, uniform):
        # A mismatch of a sampled request: strict verification has rejected it, so u > p(d) / q(d), and at 1 nothing
        # more can pass. A ratio of 0 is the mark of greedy requests, to which the coin does not apply.
        by_probability = probabilities(target)[d] - single if single < 1 else -INF
        coin = min(1, acceptance_ratio) / acc - uniform if acc < 1 and acceptance_ratio > 0 else -INF
        # The kept side of either is enough; where one is on the edge and the other refuses, the row is not clear.
        return max(by_probability, coin)

    agrees(Threshold(single=single, acc=acc), rows, statement, acceptance_ratio=ratio, uniform=uniform)


@quick
@given(mismatch_rows(), st.floats(0, 1, width=32))
def test_threshold_is_strict_at_one(rows, ratio):
    # Saturated rows, whose p(d) rounds to 1, are among these. A mismatch has u > ratio, or it would be none.
    uniform = float(np.nextafter(np.float32(ratio), np.float32(2)))
    sampled = mismatches(rows, acceptance_ratio=[ratio] * len(rows), uniform=[uniform] * len(rows))
    assert Threshold() == Threshold(single=1.0, acc=1.0)
    assert not Threshold().keep(sampled).any()
    assert not Threshold().keep(mismatches(rows)).any()


@quick
@given(mismatch_rows(), st.floats(0.01, 0.99))
def test_threshold_acc_does_not_touch_greedy_requests(rows, acc):
    assert not Threshold(acc=acc).keep(mismatches(rows)).any()


# cascade


@quick
@given(mismatch_rows(), st.floats(0, 0.999))
def test_cascade_keeps_within_a_share_of_the_best(rows, alpha):
    def statement(target, draft, d):
        p = probabilities(target)
        return p[d] - max(p) * (1 - alpha)

    agrees(Cascade(alpha=alpha), rows, statement)


@quick
@given(mismatch_rows())
def test_cascade_keeps_only_ties_at_zero_and_everything_at_one(rows):
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
def test_mars_keeps_a_second_choice_of_nearly_the_same_logit(rows, ratio):
    def statement(target, draft, d):
        best, second = order(target)[:2]
        if d != second or target[best] <= 0:
            return -INF
        return target[d] / target[best] - ratio

    agrees(Mars(ratio=ratio), rows, statement)


@pytest.mark.parametrize("best", [0.0, -1.0, -1e4])
def test_mars_is_strict_where_the_best_logit_is_not_positive(best):
    # Below zero the ratio of the logits is above 1 for *worse* tokens.
    for ratio in (0.0, 0.5, 1.0):
        assert not Mars(ratio=ratio).keep(one([best, best - 0.5, best - 1], 1)).any()
        assert not Mars(ratio=ratio).keep(one([best, best, best - 1], 1)).any()


def test_mars_by_hand():
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
@given(mismatch_rows(), st.integers(1, 10), st.floats(0, 2), st.integers(1, 6), st.integers(0, 7), st.integers(0, 7))
def test_fly_keeps_where_unsure_and_the_next_drafts_are_accepted(rows, top_k, threshold, window, run, remaining):
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
def test_fly_window_over_every_pattern_of_acceptance(window):
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
        ),
    )
    policy = Fly(window=window)
    result = verify_batch(batch, lambda rows, request: (policy.keep(rows), None))

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


def test_fly_defaults_and_needs_a_resolved_window():
    policy = Fly()
    assert (policy.entropy_top_k, policy.entropy_threshold, policy.window) == (3, 0.3, None)
    with pytest.raises(ValueError, match="window"):
        policy.keep(one([0.0, 0.0], 1))


def test_fly_takes_the_entropy_of_the_first_tokens_without_renormalising():
    # Two tokens of probability 0.1: 0.461 nats as they stand, 0.693 if they were renormalised.
    row = mismatches([(logs(*[0.1] * 10), [0.0] * 10, 1)], natively_accepted_after=1, block_remaining=1)
    assert Fly(entropy_top_k=2, entropy_threshold=0.45, window=1).keep(row).tolist() == [True]
    assert Fly(entropy_top_k=2, entropy_threshold=0.47, window=1).keep(row).tolist() == [False]


# kl


@quick
@given(mismatch_rows(), st.one_of(st.floats(0, 3), st.floats(0, 99)))
def test_kl_trusts_a_draft_that_resembles_an_unsure_target(rows, max_kl):
    def statement(target, draft, d):
        p, q = probabilities(target), probabilities(draft)

        def log(x):
            # The schema floors logarithms, so that a divergence is finite where the target rules a token out.
            return max(math.log(x), LOGPROB_FLOOR) if x > 0 else LOGPROB_FLOOR

        divergence = min(max(sum(b * (log(b) - log(a)) for a, b in zip(p, q, strict=True)), 0), -LOGPROB_FLOOR)
        return min(max_kl - divergence, 0.9 - max(p))

    agrees(Kl(max_kl=max_kl), rows, statement)


def test_kl_by_hand():
    # KL = 1/4 log 1/2 + 1/2 log 2 = 1/4 log 2 = 0.173
    row = one(logs(0.5, 0.25, 0.25), 2, draft=logs(0.25, 0.25, 0.5))
    assert Kl(max_kl=0.18).keep(row).tolist() == [True]
    assert Kl(max_kl=0.17).keep(row).tolist() == [False]
    assert Kl(max_kl=99).keep(one(logs(0.91, 0.09), 1)).tolist() == [False]  # a sure target is never overruled
    assert Kl.needs_draft_logits
    assert not any(policies.policy_class(name).needs_draft_logits for name in policies.policy_names() if name != "kl")


# random


def coins(policy: Random, positions: torch.Tensor, drafts: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    count = len(positions)
    zeros = torch.zeros(count)
    return policy.keep(
        Mismatches(
            statistics=torch.zeros(count, 16),
            target_logit_draft=zeros,
            target_logit_top=zeros,
            draft_token=drafts,
            target_token=targets,
            output_position=positions,
            natively_accepted_after=zeros.long(),
            block_remaining=zeros.long(),
            acceptance_ratio=zeros,
            uniform=zeros,
            top_k_entropy=lambda k: zeros,
        )
    )


COINS = 20_000


def coin_inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    every = torch.arange(COINS)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 151_936, (2, COINS), generator=generator)
    return {
        "one response": (every, torch.full_like(every, 17), torch.full_like(every, 23)),
        "one position": (torch.full_like(every, 5), every, torch.full_like(every, 23)),
        "one draft": (torch.full_like(every, 5), torch.full_like(every, 17), every),
        "everything": (every % 4096, *tokens),
    }[kind]


@pytest.mark.parametrize("kind", ["one response", "one position", "one draft", "everything"])
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.9])
def test_random_keeps_at_its_rate(kind, rate):
    # Five standard deviations of the binomial: one in 1.7 million by chance, and these coins never change.
    bound = 5 * math.sqrt(COINS * rate * (1 - rate))
    for seed in (0, 1, 12345, 2**31 - 1):
        kept = int(coins(Random(rate=rate, seed=seed), *coin_inputs(kind)).sum())
        assert abs(kept - COINS * rate) < bound, seed


def test_random_is_the_same_on_every_call_and_whatever_it_is_batched_with():
    inputs = coin_inputs("everything")
    policy = Random(rate=0.5, seed=3)
    kept = coins(policy, *inputs)
    assert torch.equal(kept, coins(Random(rate=0.5, seed=3), *inputs))
    alone = torch.cat([coins(policy, *(column[i : i + 1] for column in inputs)) for i in range(50)])
    assert torch.equal(kept[:50], alone)


@pytest.mark.parametrize("kind", ["one response", "everything"])
def test_random_differs_by_seed(kind):
    # Independent coins of rate 1/2 agree half of the time, here too within five standard deviations.
    inputs = coin_inputs(kind)
    first = coins(Random(rate=0.5, seed=0), *inputs)
    for seed in (1, 2, 1000):
        agreeing = int((first == coins(Random(rate=0.5, seed=seed), *inputs)).sum())
        assert abs(agreeing - COINS / 2) < 5 * math.sqrt(COINS / 4)


@pytest.mark.parametrize("change", [0, 1, 2])
def test_random_coins_of_neighbouring_mismatches_are_independent(change):
    inputs = list(coin_inputs("everything"))
    first = coins(Random(rate=0.5), *inputs)
    inputs[change] = inputs[change] + 1
    agreeing = int((first == coins(Random(rate=0.5), *inputs)).sum())
    assert abs(agreeing - COINS / 2) < 5 * math.sqrt(COINS / 4)


@quick
@given(mismatch_rows(), st.integers(0, 2**31 - 1))
def test_random_keeps_nothing_at_zero_and_everything_at_one(rows, seed):
    assert not Random(rate=0, seed=seed).keep(mismatches(rows)).any()
    assert Random(rate=1, seed=seed).keep(mismatches(rows)).all()


@quick
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 2**31))
def test_random_coin_is_a_number_below_one_for_any_integers(seed, position, draft, target):
    value = policies.coin(seed, *(torch.tensor([x]) for x in (position, draft, target)))
    assert value.dtype == torch.float32
    assert 0 <= value.item() < 1


# learned


def test_learned_is_left_to_the_runner():
    with pytest.raises(TypeError, match="learned"):
        Learned(artefact="somewhere").keep(one([0.0, 0.0], 1))


# What holds for all of them


def every_rule() -> list[Policy]:
    return [
        Strict(),
        Typical(),
        RelaxedTopK(),
        Threshold(single=0.5, acc=0.5),
        Cascade(alpha=0.5),
        Mars(),
        Fly(window=1),
        Kl(max_kl=0.5),
        Random(rate=0.5),
    ]


@settings(quick, max_examples=15)  # nine rules on every row
@given(mismatch_rows())
def test_rules_decide_each_row_by_itself_and_change_nothing(rows):
    together = mismatches(rows)
    before = together.statistics.clone()
    for rule in every_rule():
        kept = rule.keep(together)
        assert kept.tolist() == [rule.keep(mismatches([row])).item() for row in rows]
    assert torch.equal(together.statistics, before)


def test_every_registered_policy_is_covered_and_named_as_users_write_it():
    names = [rule.policy for rule in every_rule()] + ["learned"]
    assert names == list(policies.policy_names())
    for rule in every_rule():
        assert policies.policy_class(rule.policy) is type(rule)
        assert TYPE_ADAPTER.validate_python(rule.model_dump()) == rule
        assert rule.describe().startswith(rule.policy)


@pytest.mark.parametrize(
    "parameters",
    [
        {"policy": "typical", "posterior_threshold": -0.1},
        {"policy": "typical", "posterior_threshold": 1.1},
        {"policy": "typical", "posterior_alpha": -1},
        {"policy": "typical", "posterior_alpha": INF},
        {"policy": "relaxed_topk", "top_n": 0},
        {"policy": "relaxed_topk", "top_n": 2.5},
        {"policy": "relaxed_topk", "delta": -0.1},
        {"policy": "relaxed_topk", "delta": 1.5},
        {"policy": "threshold", "single": 0},
        {"policy": "threshold", "single": 1.01},
        {"policy": "threshold", "acc": 0},
        {"policy": "threshold", "acc": 2},
        {"policy": "cascade", "alpha": -0.5},
        {"policy": "cascade", "alpha": 1.5},
        {"policy": "cascade", "alpha": math.nan},
        {"policy": "mars", "ratio": -0.1},
        {"policy": "mars", "ratio": 1.1},
        {"policy": "fly", "entropy_top_k": 0},
        {"policy": "fly", "entropy_top_k": 65},
        {"policy": "fly", "entropy_threshold": -1},
        {"policy": "fly", "window": 0},
        {"policy": "fly", "window": 128},
        {"policy": "kl", "max_kl": -1},
        {"policy": "kl", "max_kl": math.nan},
        {"policy": "random", "rate": -0.01},
        {"policy": "random", "rate": 1.01},
        {"policy": "random", "rate": 0.5, "seed": -1},
        {"policy": "random", "rate": 0.5, "seed": 2**31},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(ValidationError):
        TYPE_ADAPTER.validate_python(parameters)


@pytest.mark.parametrize(
    ("parameters", "missing"),
    [
        ({"policy": "cascade"}, "alpha"),
        ({"policy": "kl"}, "max_kl"),
        ({"policy": "random"}, "rate"),
        ({"policy": "learned"}, "artefact"),
    ],
)
def test_parameters_without_a_safe_default_must_be_given(parameters, missing):
    with pytest.raises(ValidationError, match=missing):
        TYPE_ADAPTER.validate_python(parameters)


@pytest.mark.parametrize("rule", [*every_rule(), Learned(artefact="somewhere")], ids=lambda rule: rule.policy)
def test_unknown_keys_are_refused(rule):
    with pytest.raises(ValidationError, match="treshold"):
        TYPE_ADAPTER.validate_python({**rule.model_dump(), "treshold": 0.5})


@pytest.mark.parametrize("value", [{"policy": "tipical"}, {"policy": None}, {"policy": ["strict"]}, {}, "strict", 3])
def test_what_names_no_policy_is_refused(value):
    with pytest.raises(ValidationError):
        TYPE_ADAPTER.validate_python(value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"policy": "typical", "posterior_threshold": "0.09"},
        {"policy": "typical", "posterior_threshold": None},
        {"policy": "relaxed_topk", "top_n": "3"},
        {"policy": "relaxed_topk", "top_n": True},
        {"policy": "cascade", "alpha": [0.5]},
        {"policy": "fly", "window": True},
        {"policy": "random", "rate": True},
        {"policy": "random", "rate": "1"},
        {"policy": "learned", "artefact": 3},
    ],
    ids=str,
)
def test_parameters_of_the_wrong_type_are_refused(parameters):
    # JSON knows numbers from strings and booleans; {"rate": true} is a mistake, not a request to keep everything.
    with pytest.raises(ValidationError):
        TYPE_ADAPTER.validate_python(parameters)


@pytest.mark.parametrize("rule", every_rule()[1:], ids=lambda rule: rule.policy)
def test_parameters_cannot_be_changed(rule):
    name = next(name for name in type(rule).model_fields if name != "policy")
    with pytest.raises(ValidationError):
        setattr(rule, name, 1)
