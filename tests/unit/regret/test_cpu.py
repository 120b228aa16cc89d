"""The regret budget of the CPU path over whole responses, against what their overrides give up by themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.batch import Batch, BatchResult, Requests
from vllm_cospec.kernels.cpu import Found, verify_batch
from vllm_cospec.kernels.regret import REGRET_UNIT, in_units

K, VOCABULARY = 4, 9


def keep_most(found: Found) -> tuple[np.ndarray, None]:
    return torch.rand(len(found.request)).numpy() < 0.9, None


def keep_none(found: Found) -> tuple[np.ndarray, None]:
    return np.zeros(len(found.request), bool), None


def a_batch(rng: np.random.Generator, budgets: np.ndarray, spent: np.ndarray) -> Batch:
    """One block of every request; a third of the logits are ties, a few are -inf, some requests are sampled."""
    count = len(budgets)
    logits = torch.from_numpy(rng.normal(0, rng.choice([0.02, 1.0, 4.0]), (count * K, VOCABULARY)).astype(np.float32))
    if rng.random() < 0.3:
        logits = logits.round()
    logits[torch.from_numpy(rng.random(logits.shape) < 0.02)] = -np.inf
    best = logits.argmax(dim=1)
    drafts = torch.from_numpy(np.where(rng.random(count * K) < 0.3, best, rng.integers(VOCABULARY, size=count * K)))
    sampled = torch.from_numpy(rng.random(count) < 0.3).repeat_interleave(K)
    return Batch(
        draft_tokens=drafts,
        num_draft_tokens=np.full(count, K),
        accepted=torch.where(sampled, torch.from_numpy(rng.random(count * K) < 0.4), drafts == best),
        target_tokens=best,
        bonus_tokens=torch.zeros(count, dtype=torch.int64),
        raw_target_logits=logits,
        processed_target_logits=logits,
        raw_argmax=best,
        draft_logits=None,
        num_speculative_tokens=K,
        max_draft_tokens=K,
        requests=Requests(
            arbitrated=np.ones(count, bool),
            junk=np.zeros(count, bool),
            output_position=np.zeros(count, np.int64),
            overrides_so_far=np.zeros(count, np.int64),
            max_overrides=np.full(count, UNLIMITED),
            exact_tokens=np.zeros(count, np.int64),
            threshold=np.zeros(count, np.float32),
            regret_so_far=spent,
            max_regret=np.array([in_units(budget) for budget in budgets]),
        ),
    )


@dataclass
class GivenUp:
    """What the overrides of a step give up, by the definition: log p(t*) - log p(d) in float64."""

    exact: np.ndarray  # [B] float64
    overrides: np.ndarray  # [B]


def given_up(batch: Batch, result: BatchResult) -> GivenUp:
    logp = torch.log_softmax(batch.raw_target_logits.double(), dim=1)
    drafts, strict = (torch.as_tensor(values).view(-1, K) for values in (batch.draft_tokens, batch.accepted))
    emitted = result.output[:, :K].long() == drafts
    emitted &= torch.cumprod(emitted.int(), dim=1).bool()
    # the token after the last accepted draft may equal a draft by chance: it is the target's, no override
    accepted = (result.output >= 0).sum(1, keepdim=True) - 1
    override = emitted & (torch.arange(K) < accepted) & ~strict
    distance = (logp.amax(1) - logp.gather(1, drafts.reshape(-1, 1)).squeeze(1)).view(-1, K)
    return GivenUp(torch.where(override, distance, 0.0).sum(1).numpy(), override.sum(1).numpy())


def test_no_response_of_100_000_blocks_gives_up_more_than_its_budget() -> None:
    torch.manual_seed(0)
    rng, responses, blocks, overrides, refused = np.random.default_rng(0), 1000, 0, 0, 0
    while blocks < 100_000:
        budgets = rng.choice([0.0, 0.0007, REGRET_UNIT, 0.3, 2.0, 25.0], responses)
        spent, exact, kept = np.zeros(responses), np.zeros(responses), np.zeros(responses, np.int64)
        for _ in range(10):
            batch = a_batch(rng, budgets, spent)
            result = verify_batch(batch, keep_most)
            own = given_up(batch, result)
            assert own.overrides.tolist() == result.overrides.tolist()
            spent, exact, kept = spent + result.regret, exact + own.exact, kept + own.overrides
            refused += result.num_mismatches - int(result.overrides.sum())
            blocks += responses
        assert (exact <= budgets + 1e-5).all()  # a log-probability of float64 against a distance of float32
        assert (spent <= budgets).all()
        assert (np.abs(spent - exact) <= kept * REGRET_UNIT + 1e-5).all()
        assert not kept[budgets < REGRET_UNIT].any()
        overrides += int(kept.sum())
    assert overrides > 20_000
    assert refused > 20_000


@pytest.mark.parametrize("budget", [0.0, REGRET_UNIT / 2])
def test_a_budget_of_nothing_gives_the_tokens_of_strict(budget: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        batch = a_batch(rng, np.full(500, budget), np.zeros(500))
        found = verify_batch(batch, keep_most)
        strict = verify_batch(batch, keep_none)
        unlimited = replace(batch, requests=replace(batch.requests, max_regret=np.full(500, np.inf)))
        assert torch.equal(found.output, strict.output)
        assert not found.overrides.any()
        assert not torch.equal(verify_batch(unlimited, keep_most).output, strict.output)
