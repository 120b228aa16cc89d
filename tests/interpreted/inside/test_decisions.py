"""The fused kernels against the reference, and their strict verdict and emitted tokens against stock V2."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator

import arbitration_cases as cases
import pytest
import torch
from agreement import check
from arbitration_cases import POLICIES, arbiter

from vllm_cospec.kernels.policies import Fsd, Learned, Mixture, Rule, Strict
from vllm_cospec.kernels.triton import launch

pytestmark = pytest.mark.usefixtures("poison")

REPETITIONS = int(os.environ.get("COSPEC_TEST_REPETITIONS", "1"))
"""Multiplies the number of generated batches."""


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Counts blocks; printed when the sweep is over."""
    count: Counter[str] = Counter()
    yield count
    print(f"\ncompared with the reference: {dict(count)}")


@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("name", POLICIES)
def test_decisions_equal_the_reference(name: str, regime: str, tally: Counter[str]) -> None:
    compared = total = 0
    network = arbiter(32, 32)
    for repetition in range(REPETITIONS):
        # a part of a block; now and then several parts, or two blocks, with a ragged tail
        vocab = {4: 2_600, 9: 9_000}.get(repetition % 10, 111)
        for variant in range(2):
            seed = 1000 * repetition + 10 * variant + cases.REGIMES.index(regime)
            k = (5, 1 + (2 + 7 * repetition + 3 * list(POLICIES).index(name)) % 16)[variant]
            case = cases.make_case(
                seed, vocab=vocab, k=k, regime=regime, separate=bool((seed + repetition) % 2) or regime == "nan",
                dtype=(torch.float32, torch.bfloat16)[variant], agreement=0.4,
            )  # fmt: skip
            compared += check(case, POLICIES[name], network)
            total += len(case.num_drafts)
    tally["blocks"] += compared
    tally["too close to call in float32"] += total - compared
    assert compared >= 0.8 * total


@pytest.mark.parametrize("hidden", [(70,), (70, 40), (72, 70)])
def test_scores_of_larger_networks_decide_as_the_reference(hidden: tuple[int, ...]) -> None:
    """One layer, two that stay in registers, and two of which the second is read in parts."""
    network = arbiter(*hidden)
    for seed in range(3):
        case = cases.make_case(seed, k=5, agreement=0.4, dtype=(torch.float32, torch.bfloat16)[seed % 2])
        assert check(case, POLICIES["learned"], network) >= 0.8 * len(case.num_drafts)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.needs_draft_logits])
def test_positions_decided_at_once_are_decided_as_one_after_the_other(name: str) -> None:
    """Without a trace a rule that knows enough from the first pass decides all of a block together."""
    network, overrides = arbiter(32), 0
    for regime, seed in itertools.product(cases.REGIMES, range(2 * REPETITIONS)):
        case = cases.make_case(
            700 + seed, k=(5, 1 + 5 * seed % 16)[seed % 2], requests=6, regime=regime, separate=regime == "nan",
            agreement=0.5, budgets=seed % 2 == 1, draft_logits=regime != "nan",  # a trace reads the draft's rows too
        )  # fmt: skip
        (one, counted, spent), (together, counted_again, spent_again) = (
            case.ours(POLICIES[name], network, collect=collect) for collect in (True, False)
        )
        assert together.num_sampled.tolist() == one.num_sampled.tolist()
        for request, count in enumerate(one.num_sampled.tolist()):
            assert together.sampled[request, :count].tolist() == one.sampled[request, :count].tolist()
        assert counted_again.tolist() == counted.tolist()
        for field in ("overrides_so_far", "regret_so_far", "stops"):
            assert getattr(spent_again, field).tolist() == getattr(spent, field).tolist(), field
        overrides += int(counted[:-1].sum())
    assert (overrides > 0) == (name != "strict")


@pytest.mark.parametrize("name", ["typical", "learned"])
@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_decisions_for_every_block_length(name: str, k: int) -> None:
    case = cases.make_case(k, k=k, requests=3, agreement=0.6)
    assert check(case, POLICIES[name], arbiter(32)) >= 2


@pytest.mark.parametrize("hidden", [(1,), (32,), (20, 7), (256, 256)])
def test_networks_of_every_shape(hidden: tuple[int, ...]) -> None:
    case = cases.make_case(7, arbitrated=1.0, sampled=0.0, full=True, requests=3, agreement=0.1)
    assert check(case, POLICIES["learned"], arbiter(*hidden)) >= 2


@pytest.mark.parametrize("name", ["learned", "fly"])
def test_drafters_without_logits(name: str) -> None:
    case = cases.make_case(3, draft_logits=False, agreement=0.4)
    assert check(case, POLICIES[name], arbiter(32)) >= 3


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(32_000, torch.bfloat16), (128_256, torch.float32), (151_936, torch.bfloat16)]
)
def test_large_vocabularies_with_a_ragged_tail(vocab: int, dtype: torch.dtype) -> None:
    case = cases.make_case(vocab, vocab=vocab, k=2, requests=2, dtype=dtype, arbitrated=1.0, agreement=0.2, full=True)
    check(case, POLICIES["learned"], arbiter(32, 32))


@pytest.mark.parametrize(
    "rule", [Fsd(max_divergence=0.3), Fsd(divergence="tv", max_divergence=0.6), Mixture(weight=0.5)], ids=Rule.describe
)
def test_what_is_taken_of_both_rows_is_combined_over_their_blocks(rule: Rule) -> None:
    case = cases.make_case(
        17, vocab=17_001, k=3, requests=4, arbitrated=1.0, sampled=0.3, agreement=0.2, full=True, dtype=torch.float32
    )
    assert check(case, rule) >= 3


@pytest.mark.parametrize(("agreement", "sampled"), [(1.0, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_everything_accepted_or_rejected(agreement: float, sampled: float) -> None:
    case = cases.make_case(11, agreement=agreement, sampled=sampled, full=True, requests=3)
    check(case, POLICIES["typical"])


@pytest.mark.parametrize("draft_logits", [True, False])
@pytest.mark.parametrize("arbitrated", [0.0, 1.0])
@pytest.mark.parametrize("separate", [False, True])
def test_strict_is_bit_identical_to_stock(separate: bool, arbitrated: float, draft_logits: bool) -> None:
    for seed in range(3 * REPETITIONS):
        case = cases.make_case(
            seed, requests=5, separate=separate, arbitrated=arbitrated, draft_logits=draft_logits, agreement=0.7
        )
        sampled, num_sampled = case.stock()
        got, _, _ = case.ours(Strict())
        assert got.num_sampled.tolist() == num_sampled.tolist()
        for request, count in enumerate(num_sampled.tolist()):
            assert got.sampled[request, :count].tolist() == sampled[request, :count].tolist()


def test_strict_requests_of_a_mixed_batch_get_the_stock_tokens() -> None:
    case = cases.make_case(5, requests=6, arbitrated=0.5, agreement=0.3, full=True)
    sampled, num_sampled = case.stock()
    got, _, _ = case.ours(POLICIES["random"])
    for request, slot in enumerate(case.slot):
        if not case.slots.arbitrated[slot]:
            count = int(num_sampled[request])
            assert got.sampled[request, :count].tolist() == sampled[request, :count].tolist()


def test_a_forced_decision_overrides_the_policy_and_what_lies_before_it_is_kept() -> None:
    network = arbiter(32)
    cases.set_bias(network, -50.0)  # keeps nothing by itself
    case = cases.make_case(5, requests=8, arbitrated=1.0, agreement=0.3, full=True)
    free, _, _ = case.ours(Learned(artefact="unused"), network, collect=True)
    _, _, expanded, _ = case.layout()
    position = case.pos + 1 - case.slots.response_start[expanded]
    consulted = free.trace.action == 0
    forced = 0
    for row in consulted.nonzero().flatten().tolist():
        case.slots.forced[expanded[row]] = 2 * int(position[row]) + 1
        forced += 1
    got, counters, _ = case.ours(Learned(artefact="unused"), network, collect=True)
    assert forced > 2
    assert (got.trace.action[consulted] == 1).all()
    assert int(counters[:-1].sum()) == forced
    unseen, _, _ = case.ours(Learned(artefact="unused"), network)
    assert unseen.num_sampled.tolist() == free.num_sampled.tolist()  # only an engine that collects looks at it


def test_sampled_actions_follow_the_score_and_leave_the_verdict_alone() -> None:
    network = arbiter(32)
    cases.set_bias(network, 50.0)
    case = cases.make_case(5, arbitrated=1.0, agreement=0.3, full=True)
    always, _, _ = case.ours(Learned(artefact="unused"), network, collect=True, sample_actions=True)
    cases.set_bias(network, -50.0)
    never, counters, _ = case.ours(Learned(artefact="unused"), network, collect=True, sample_actions=True)
    assert (always.trace.action != 0).all()
    assert (always.trace.action == 1).any()
    assert (never.trace.action != 1).all()
    assert int(counters[:-1].sum()) == 0
    assert never.num_sampled.tolist() == case.stock()[1].tolist()


def test_warm_up_leaves_the_draft_logits_alone() -> None:
    draft = torch.randn(2, 3, 111)
    before = draft.clone()
    server = launch.ServerShapes(111, torch.float32, draft, 3, cases.CPU)
    launch.warm_up(server, cases.compile_policy(POLICIES["typical"], cases.CPU))
    assert torch.equal(draft, before)
