"""The control: a coin that is seeded, fair, and independent of everything but its mismatch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import mismatch_rows, mismatches, quick

from vllm_cospec.kernels import policies
from vllm_cospec.kernels.policies import Mismatches, Random


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
            divergence=lambda kind: zeros,
            mixture_lead=lambda weight: zeros,
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
def test_random_keeps_at_its_rate(kind: str, rate: float) -> None:
    # Five standard deviations of the binomial: one in 1.7 million by chance, and these coins never change.
    bound = 5 * math.sqrt(COINS * rate * (1 - rate))
    for seed in (0, 1, 12345, 2**31 - 1):
        kept = int(coins(Random(rate=rate, seed=seed), *coin_inputs(kind)).sum())
        assert abs(kept - COINS * rate) < bound, seed


def test_random_is_the_same_on_every_call_and_whatever_it_is_batched_with() -> None:
    inputs = coin_inputs("everything")
    policy = Random(rate=0.5, seed=3)
    kept = coins(policy, *inputs)
    assert torch.equal(kept, coins(Random(rate=0.5, seed=3), *inputs))
    alone = torch.cat([coins(policy, *(column[i : i + 1] for column in inputs)) for i in range(50)])
    assert torch.equal(kept[:50], alone)


@pytest.mark.parametrize("kind", ["one response", "everything"])
def test_random_differs_by_seed(kind: str) -> None:
    # Independent coins of rate 1/2 agree half of the time, here too within five standard deviations.
    inputs = coin_inputs(kind)
    first = coins(Random(rate=0.5, seed=0), *inputs)
    for seed in (1, 2, 1000):
        agreeing = int((first == coins(Random(rate=0.5, seed=seed), *inputs)).sum())
        assert abs(agreeing - COINS / 2) < 5 * math.sqrt(COINS / 4)


@pytest.mark.parametrize("change", [0, 1, 2])
def test_random_coins_of_neighbouring_mismatches_are_independent(change: int) -> None:
    inputs = list(coin_inputs("everything"))
    first = coins(Random(rate=0.5), *inputs)
    inputs[change] = inputs[change] + 1
    agreeing = int((first == coins(Random(rate=0.5), *inputs)).sum())
    assert abs(agreeing - COINS / 2) < 5 * math.sqrt(COINS / 4)


@quick
@given(mismatch_rows(), st.integers(0, 2**31 - 1))
def test_random_keeps_nothing_at_zero_and_everything_at_one(rows: list[tuple[Any, ...]], seed: int) -> None:
    assert not Random(rate=0, seed=seed).keep(mismatches(rows)).any()
    assert Random(rate=1, seed=seed).keep(mismatches(rows)).all()


@quick
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 2**31))
def test_random_coin_is_a_number_below_one_for_any_integers(seed: int, position: int, draft: int, target: int) -> None:
    value = policies.coin(seed, *(torch.tensor([x]) for x in (position, draft, target)))
    assert value.dtype == torch.float32
    assert 0 <= value.item() < 1
