"""Cases for the CPU path: a list of reference blocks, and the batch that is put together from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vllm_cospec.kernels import UNLIMITED, reference
from vllm_cospec.kernels.batch import Batch, BatchResult, LogitRows, Requests
from vllm_cospec.kernels.cpu import PLACEHOLDER, Found, verify_batch
from vllm_cospec.kernels.reference import Block, verify_block
from vllm_cospec.kernels.regret import REGRET_UNIT, in_units

INF = math.inf


def tolerance(vocabulary: int) -> dict[str, Any]:
    """Bound the difference of float32 (CPU path) and float64 (reference).

    A log-probability passes through three roundings of 6e-8 of its magnitude: a relative 1e-6 leaves room. Entropy and
    divergence sum V products whose weights exp(log p) carry the *absolute* error of log p as a relative one. Measured
    over the regimes below: at most 4e-7 up to 40 tokens, 2e-5 at 32,000.
    """
    return {"rtol": 1e-6, "atol": 3e-6 if vocabulary <= 40 else 6e-5}


@dataclass
class Case:
    """One batch, as the reference and as the CPU path see it."""

    blocks: list[Block]
    keep: np.ndarray  # [B, K] bool, what the policy says

    def batch(self, width: int | None = None, token_dtype: torch.dtype = torch.int64) -> Batch:
        blocks = self.blocks
        counts = [len(block.draft_tokens) for block in blocks]

        def tokens(name: str) -> torch.Tensor:
            return torch.tensor([x for block in blocks for x in getattr(block, name)], dtype=token_dtype)

        def draft_logits(request: np.ndarray, position: np.ndarray) -> LogitRows:
            every = [block.draft_logits for block in blocks if block.draft_logits is not None]
            return LogitRows(every, request, position)

        def per_request(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(block, name) for block in blocks], dtype)

        raw = torch.cat([block.raw_target_logits for block in blocks])
        return Batch(
            draft_tokens=tokens("draft_tokens"),
            num_draft_tokens=np.array(counts, np.int64),
            accepted=tokens("accepted_by_strict").bool(),
            target_tokens=tokens("target_tokens"),
            bonus_tokens=torch.tensor([block.bonus_token for block in blocks], dtype=token_dtype),
            raw_target_logits=raw,
            processed_target_logits=torch.cat([block.processed_target_logits for block in blocks]),
            raw_argmax=raw.argmax(dim=-1),
            draft_logits=None if blocks[0].draft_logits is None else draft_logits,
            num_speculative_tokens=blocks[0].num_speculative_tokens,
            max_draft_tokens=max(counts) if width is None else width,
            requests=Requests(
                arbitrated=per_request("arbitrated", bool),
                junk=per_request("junk", bool),
                output_position=per_request("output_position", np.int64),
                overrides_so_far=per_request("overrides_so_far", np.int64),
                max_overrides=np.array(
                    [UNLIMITED if b.max_overrides is None else b.max_overrides for b in blocks], np.int64
                ),
                exact_tokens=per_request("exact_tokens", np.int64),
                threshold=np.zeros(len(blocks), np.float32),
                regret_so_far=per_request("regret_so_far", np.float64),
                max_regret=np.array([in_units(block.max_regret) for block in blocks]),
            ),
        )

    def decide(self, found: Found) -> tuple[np.ndarray, None]:
        return self.keep[found.request, found.position], None


@dataclass(frozen=True)
class Regime:
    """What is unusual about the batches of one test."""

    batches: int = 60
    vocabulary: tuple[int, int] = (3, 40)
    dtype: torch.dtype = torch.float32
    draft_logits: bool | None = None  # None: either
    match: float = 0.5  # probability that the draft is the target's token
    keep: float = 0.8  # probability that the policy keeps
    empty: float = 0.1  # probability of a request without drafts
    sampled: float = 0.3  # probability of a sampled request: verdicts and tokens are not those of the argmax
    minus_inf: float = 0.02  # probability of an entry of -inf, per entry
    oddity: float = 0.0  # probability, per row, of a NaN, a +inf or a row of nothing but -inf
    ties: bool = False
    scale: float = 3.0  # of the logits; 30 spreads log-probabilities down to the floor, 1e4 saturates every row
    out_of_range: float = 0.02  # probability of a draft that is no token
    budget: float = 0.0  # probability of max_regret
    limited: float = 0.08  # probability of each of: junk, not arbitrated, max_overrides, exact_tokens
    max_drafts: int = 16


REGIMES = {
    "mixed": Regime(batches=120),
    "mixed_bf16": Regime(batches=80, dtype=torch.bfloat16),
    "everything_agrees": Regime(match=1.0, sampled=0, minus_inf=0, out_of_range=0),
    "nothing_agrees_all_kept": Regime(match=0.0, sampled=0, keep=1.0, limited=0, out_of_range=0, minus_inf=0),
    "nothing_agrees_none_kept": Regime(match=0.0, keep=0.0),
    "mostly_without_drafts": Regime(empty=0.7),
    "no_drafts_at_all": Regime(batches=5, empty=1.0),
    "minus_inf": Regime(minus_inf=0.6, keep=1.0, limited=0, match=0.7),
    "nan_and_inf": Regime(oddity=0.3, keep=1.0, limited=0),
    "ties": Regime(batches=80, ties=True, keep=0.9),
    "ties_bf16": Regime(ties=True, keep=0.9, dtype=torch.bfloat16),
    "steep": Regime(batches=80, scale=30.0, keep=0.9),
    "saturated": Regime(scale=1e4, keep=0.9),
    "saturated_bf16": Regime(scale=1e4, keep=0.9, dtype=torch.bfloat16),
    "not_tokens": Regime(out_of_range=0.3, keep=1.0, limited=0),
    "limits": Regime(batches=80, limited=0.4, keep=1.0, match=0.2, minus_inf=0),
    "sampled": Regime(sampled=1.0),
    "zero_to_ample_budgets": Regime(batches=80, budget=0.8, keep=0.9, match=0.3, scale=1.0),
    "zero_to_ample_budgets_bf16": Regime(batches=60, budget=0.8, keep=0.9, match=0.3, dtype=torch.bfloat16),
    "zero_to_ample_budgets_ties": Regime(batches=60, budget=0.8, keep=0.9, match=0.3, ties=True, sampled=0.5),
    "without_draft_logits": Regime(draft_logits=False),
    "one_draft": Regime(max_drafts=1, empty=0.3),
    "wide": Regime(batches=6, vocabulary=(32_000, 32_000), draft_logits=True, match=0.2, keep=0.9, max_drafts=6),
    "wide_bf16": Regime(batches=4, vocabulary=(32_000, 32_000), dtype=torch.bfloat16, match=0.2, max_drafts=6),
}


def random_rows(rng: np.random.Generator, regime: Regime, count: int, vocabulary: int) -> torch.Tensor:
    logits = rng.normal(0, regime.scale, (count, vocabulary))
    if regime.ties:
        logits = np.round(logits / regime.scale)
    logits[rng.random(logits.shape) < regime.minus_inf] = -INF
    hopeless = ~np.isfinite(logits).any(axis=1)
    logits[hopeless, rng.integers(vocabulary)] = 1.0
    for row in np.flatnonzero(rng.random(count) < regime.oddity):
        logits[row, rng.integers(vocabulary)] = rng.choice([math.nan, INF])
        if rng.random() < 0.3:
            logits[row] = -INF
    return torch.from_numpy(logits).to(regime.dtype)


def random_block(rng: np.random.Generator, regime: Regime, vocabulary: int, k: int, draft_logits: bool) -> Block:
    n = 0 if rng.random() < regime.empty else int(rng.integers(1, k + 1))
    raw = random_rows(rng, regime, n, vocabulary)
    processed = raw.clone()
    processed[torch.from_numpy(rng.random((n, vocabulary)) < 0.03)] = -INF  # truncation
    sampled = rng.random() < regime.sampled
    targets = rng.integers(vocabulary, size=n) if sampled else processed.float().argmax(dim=-1).numpy()
    drafts = np.where(rng.random(n) < regime.match, targets, rng.integers(vocabulary, size=n))
    no_token = rng.random(n) < regime.out_of_range
    drafts = np.where(no_token, rng.choice([-1, vocabulary, vocabulary + 7, 2**31 - 1], size=n), drafts)
    # A sampled draft may be rejected although it is the target's argmax, and accepted although it is not.
    accepted = (rng.random(n) < 0.5) & ~no_token if sampled else drafts == targets

    def limited() -> bool:
        return rng.random() < regime.limited

    return Block(
        draft_tokens=drafts.tolist(),
        accepted_by_strict=accepted.tolist(),
        target_tokens=targets.tolist(),
        bonus_token=int(rng.integers(vocabulary)),
        raw_target_logits=raw,
        processed_target_logits=processed,
        draft_logits=random_rows(rng, regime, n, vocabulary) if draft_logits else None,
        num_speculative_tokens=k,
        arbitrated=not limited(),
        junk=limited(),
        output_position=int(rng.integers(0, 40)),
        overrides_so_far=int(rng.integers(0, 4)),
        max_overrides=int(rng.integers(0, 7)) if limited() else None,
        exact_tokens=int(rng.integers(0, 60)) if limited() else 0,
        **random_budget(rng.spawn(1)[0], regime),
    )


def random_budget(rng: np.random.Generator, regime: Regime) -> dict[str, float]:
    if rng.random() >= regime.budget:
        return {}
    budget = float(rng.choice([0.0, 1e-6, REGRET_UNIT, rng.exponential(regime.scale), 10 * regime.scale]))
    spent = float(rng.choice([0.0, in_units(budget * rng.random()), in_units(budget), in_units(2 * budget)]))
    return {"max_regret": budget, "regret_so_far": spent}


def random_case(rng: np.random.Generator, regime: Regime) -> Case:
    vocabulary = int(rng.integers(regime.vocabulary[0], regime.vocabulary[1] + 1))
    k = int(rng.integers(1, regime.max_drafts + 1))
    with_logits = bool(rng.random() < 0.7) if regime.draft_logits is None else regime.draft_logits
    blocks = [random_block(rng, regime, vocabulary, k, with_logits) for _ in range(rng.integers(1, 7))]
    return Case(blocks, rng.random((len(blocks), k)) < regime.keep)


def cases(name: str) -> list[Case]:
    rng = np.random.default_rng(sorted(REGIMES).index(name))
    return [random_case(rng, REGIMES[name]) for _ in range(REGIMES[name].batches)]


def decisions(row: np.ndarray) -> Callable[[torch.Tensor, int], bool]:
    """The policy of the reference that keeps where ``row`` says so."""
    return lambda _, position: bool(row[position])


def consulted_rows(result: BatchResult, request: int) -> list[tuple[int, torch.Tensor, bool]]:
    """Return (position, statistics, kept) of every mismatch of one request that was put to the policy."""
    return [
        (int(consulted.position[i]), torch.from_numpy(consulted.statistics[i]), bool(consulted.kept[i]))
        for consulted in result.consulted
        for i in np.flatnonzero(consulted.request == request)
    ]


def check_against_reference(case: Case, result: BatchResult, width: int) -> list[reference.BlockResult]:
    expected = [verify_block(block, decisions(row)) for block, row in zip(case.blocks, case.keep, strict=True)]
    vocabulary = case.blocks[0].raw_target_logits.shape[1]
    assert result.output.dtype == torch.int32
    assert result.output.shape == (len(expected), width + 1)
    for request, (truth, emitted) in enumerate(zip(expected, result.output.tolist(), strict=True)):
        assert emitted == truth.tokens + [PLACEHOLDER] * (width + 1 - len(truth.tokens))
        assert len(truth.tokens) == truth.num_accepted + 1
        assert result.overrides[request] == len(truth.overrides)
        assert result.regret[request] == truth.regret

        # NaN rows: see test_rows_with_nan_are_not_recorded_as_consulted.
        consulted = [row for row in consulted_rows(result, request) if not row[1].isnan().any()]
        positions = truth.mismatches[: len(truth.statistics)]  # what is not consulted ends the block
        assert [position for position, _, _ in consulted] == positions
        assert [kept for _, _, kept in consulted] == [position in truth.overrides for position in positions]
        for (_, statistics, _), row in zip(consulted, truth.statistics, strict=True):
            torch.testing.assert_close(statistics, row, **tolerance(vocabulary))

    counted = [len(truth.mismatches) * block.arbitrated for block, truth in zip(case.blocks, expected, strict=True)]
    assert result.mismatches.tolist() == counted
    overrides = [position for truth in expected for position in truth.overrides]
    assert result.overrides_per_position.tolist() == np.bincount(overrides, minlength=width)[:width].tolist()
    return expected


def block(n: int = 4, vocabulary: int = 5, **changes: Any) -> Block:
    """n flat rows whose drafts (1) are all rejected; the target says 2, the bonus token is 3."""
    logits = torch.zeros(n, vocabulary)
    return replace(
        Block(
            draft_tokens=[1] * n,
            accepted_by_strict=[False] * n,
            target_tokens=[2] * n,
            bonus_token=3,
            raw_target_logits=logits,
            processed_target_logits=logits.clone(),
            draft_logits=logits.clone(),
            num_speculative_tokens=n,
        ),
        **changes,
    )


def verify(*blocks: Block, keep: bool = True) -> BatchResult:
    case = Case(list(blocks), np.full((len(blocks), blocks[0].num_speculative_tokens), keep))
    return verify_batch(case.batch(blocks[0].num_speculative_tokens), case.decide, collect=True)
