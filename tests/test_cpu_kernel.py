"""The CPU path against the reference, by regime, and the statistics against rows worked out by hand.

A case is a list of reference blocks; the batch the CPU path gets is put together from them. Decisions are compared
exactly: the policy of these tests is a table over (request, position), so that no rounding can tip it.
"""

import copy
import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from vllm_cospec.kernels import reference
from vllm_cospec.kernels.cpu import (
    PLACEHOLDER,
    UNLIMITED,
    Batch,
    BatchResult,
    Requests,
    logit_statistics,
    top_k_entropy,
    verify_batch,
)
from vllm_cospec.kernels.reference import Block, verify_block
from vllm_cospec.policies import Mismatches
from vllm_cospec.statistics import DRAFT_STATISTICS, INDEX, LOGPROB_FLOOR, NAMES, NUM_STATISTICS, schema_hash

INF = math.inf


def tolerance(vocabulary: int) -> dict[str, float]:
    """Bound the difference of float32 (CPU path) and float64 (reference).

    A log-probability passes through three roundings of 6e-8 of its magnitude: a relative 1e-6 leaves room. Entropy and
    divergence sum V products whose weights exp(log p) carry the *absolute* error of log p as a relative one. Measured
    over the regimes below: at most 4e-7 up to 40 tokens, 2e-5 at 32,000.
    """
    return {"rtol": 1e-6, "atol": 3e-6 if vocabulary <= 40 else 6e-5}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what torch.empty returns with NaN, so that an unwritten statistic cannot pass for a right one."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Cases


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

        def draft_logits(request: np.ndarray, position: np.ndarray) -> torch.Tensor:
            return torch.stack([blocks[r].draft_logits[i] for r, i in zip(request, position, strict=True)])

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
            ),
        )

    def decide(self, rows: Mismatches, request: np.ndarray) -> tuple[torch.Tensor, None]:
        start = np.array([self.blocks[r].output_position for r in request])
        return torch.from_numpy(self.keep[request, rows.output_position.numpy() - start]), None


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
    )


def random_case(rng: np.random.Generator, regime: Regime) -> Case:
    vocabulary = int(rng.integers(regime.vocabulary[0], regime.vocabulary[1] + 1))
    k = int(rng.integers(1, regime.max_drafts + 1))
    with_logits = bool(rng.random() < 0.7) if regime.draft_logits is None else regime.draft_logits
    blocks = [random_block(rng, regime, vocabulary, k, with_logits) for _ in range(rng.integers(1, 7))]
    return Case(blocks, rng.random((len(blocks), k)) < regime.keep)


def cases(name: str) -> list[Case]:
    rng = np.random.default_rng(sorted(REGIMES).index(name))
    return [random_case(rng, REGIMES[name]) for _ in range(REGIMES[name].batches)]


def consulted_rows(result: BatchResult, request: int) -> list[tuple[int, torch.Tensor, bool]]:
    """Return (position, statistics, kept) of every mismatch of one request that was put to the policy."""
    return [
        (int(consulted.position[i]), consulted.statistics[i], bool(consulted.kept[i]))
        for consulted in result.consulted
        for i in np.flatnonzero(consulted.request == request)
    ]


def check_against_reference(case: Case, result: BatchResult, width: int) -> list[reference.BlockResult]:
    expected = [
        verify_block(block, lambda _, position, row=row: bool(row[position]))
        for block, row in zip(case.blocks, case.keep, strict=True)
    ]
    vocabulary = case.blocks[0].raw_target_logits.shape[1]
    assert result.output.dtype == torch.int32
    assert result.output.shape == (len(expected), width + 1)
    for request, (truth, emitted) in enumerate(zip(expected, result.output.tolist(), strict=True)):
        assert emitted == truth.tokens + [PLACEHOLDER] * (width + 1 - len(truth.tokens))
        assert len(truth.tokens) == truth.num_accepted + 1
        assert result.overrides[request] == len(truth.overrides)

        # NaN rows: see test_rows_with_nan_are_not_recorded_as_consulted.
        consulted = [row for row in consulted_rows(result, request) if not row[1].isnan().any()]
        positions = truth.mismatches[: len(truth.statistics)]  # what is not consulted ends the block
        assert [position for position, _, _ in consulted] == positions
        assert [kept for _, _, kept in consulted] == [position in truth.overrides for position in positions]
        for (_, statistics, _), row in zip(consulted, truth.statistics, strict=True):
            torch.testing.assert_close(statistics, row, **tolerance(vocabulary))

    arbitrated = [truth for block, truth in zip(case.blocks, expected, strict=True) if block.arbitrated]
    assert result.num_mismatches == sum(len(truth.mismatches) for truth in arbitrated)
    overrides = [position for truth in expected for position in truth.overrides]
    assert result.overrides_per_position.tolist() == np.bincount(overrides, minlength=width)[:width].tolist()
    return expected


# Agreement


@pytest.mark.parametrize("name", REGIMES)
def test_cpu_path_equals_the_reference(name):
    for number, case in enumerate(cases(name)):
        k = case.blocks[0].num_speculative_tokens
        width = k if number % 3 == 0 else max(len(block.draft_tokens) for block in case.blocks)
        batch = case.batch(width, token_dtype=torch.int32 if number % 2 else torch.int64)
        check_against_reference(case, verify_batch(batch, case.decide, collect=True), width)


def test_regimes_reach_what_they_are_there_for():
    """An agreement over thousands of requests in which nothing is ever overridden would mean nothing."""
    total = 0
    seen = dict.fromkeys(("complete", "override", "several_overrides", "stopped_by_policy", "not_consulted", "nan"), 0)
    for name in REGIMES:
        for case in cases(name) if "wide" not in name else []:
            total += len(case.blocks)
            for block, row in zip(case.blocks, case.keep, strict=True):
                truth = verify_block(block, lambda _, position, row=row: bool(row[position]))
                n = len(block.draft_tokens)
                seen["complete"] += 0 < n == truth.num_accepted
                seen["override"] += bool(truth.overrides)
                seen["several_overrides"] += len(truth.overrides) > 1
                consulted = len(truth.statistics)
                seen["stopped_by_policy"] += consulted == len(truth.mismatches) > len(truth.overrides)
                seen["not_consulted"] += consulted < len(truth.mismatches)
                seen["nan"] += bool(block.raw_target_logits.isnan().any())
    assert total >= 2000
    assert min(seen.values()) >= 50, seen


def test_a_policy_that_reads_statistics_decides_as_in_the_reference():
    """The table of the other tests ignores statistics; here a linear score of all of them decides."""
    several = cases("mixed") + cases("ties")
    rows: list[torch.Tensor] = []
    for case in several:
        for block in case.blocks:
            rows += verify_block(block, lambda statistics, position: True).statistics
    table = torch.stack(rows)
    weights = torch.from_numpy(np.random.default_rng(0).normal(0, 1, NUM_STATISTICS)).float()
    weights /= table.std(dim=0).clamp(min=1e-3)
    middle = (table @ weights).median()  # so that about half are kept

    compared = overrides = mismatches = 0
    for case in several:
        closest = INF

        def keep(statistics: torch.Tensor, position: int) -> bool:
            nonlocal closest
            score = float(statistics @ weights - middle)
            closest = min(closest, abs(score))
            return score > 0

        expected = [verify_block(block, keep).tokens for block in case.blocks]
        if closest < 1e-2:  # near zero the two precisions may fall on different sides
            continue
        result = verify_batch(case.batch(), lambda rows, request: (rows.statistics @ weights > middle, None))
        for tokens, emitted in zip(expected, result.output.tolist(), strict=True):
            assert emitted == tokens + [PLACEHOLDER] * (len(emitted) - len(tokens))
        compared += 1
        overrides += int(result.overrides.sum())
        mismatches += result.num_mismatches
    assert compared >= 100
    assert 0.2 < overrides / mismatches < 0.8


@pytest.mark.parametrize("name", ["mixed", "limits", "nan_and_inf", "saturated_bf16"])
def test_permuting_the_requests_permutes_the_results(name):
    rng = np.random.default_rng(1)
    for case in cases(name)[:15]:
        permutation = rng.permutation(len(case.blocks))
        permuted = Case([case.blocks[i] for i in permutation], case.keep[permutation])
        first = verify_batch(case.batch(), case.decide, collect=True)
        second = verify_batch(permuted.batch(), permuted.decide, collect=True)
        assert torch.equal(first.output[torch.from_numpy(permutation)], second.output)
        assert first.num_mismatches == second.num_mismatches
        assert first.overrides[permutation].tolist() == second.overrides.tolist()
        assert first.overrides_per_position.tolist() == second.overrides_per_position.tolist()
        for new, old in enumerate(permutation):
            rows, permuted_rows = consulted_rows(first, old), consulted_rows(second, new)
            assert [(i, kept) for i, _, kept in rows] == [(i, kept) for i, _, kept in permuted_rows]
            for (_, a, _), (_, b, _) in zip(rows, permuted_rows, strict=True):
                # A row is reduced by itself, so even its last bit does not depend on its neighbours.
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["mixed", "mixed_bf16", "nan_and_inf", "not_tokens", "no_drafts_at_all"])
def test_inputs_are_not_modified(name):
    for case in cases(name)[:10]:
        batch = case.batch()
        before = copy.deepcopy(replace(batch, draft_logits=None))
        blocks = copy.deepcopy(case.blocks)
        verify_batch(batch, case.decide, collect=True)
        for holder, old in ((batch, before), (batch.requests, before.requests)):
            for field in fields(holder):
                now, then = getattr(holder, field.name), getattr(old, field.name)
                if isinstance(now, torch.Tensor):
                    torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
                elif isinstance(now, np.ndarray):
                    np.testing.assert_array_equal(now, then)
        for block, old_block in zip(case.blocks, blocks, strict=True):
            if block.draft_logits is not None:
                torch.testing.assert_close(block.draft_logits, old_block.draft_logits, rtol=0, atol=0, equal_nan=True)


def test_collecting_changes_no_decision():
    for case in cases("mixed")[:20]:
        plain, collected = (verify_batch(case.batch(), case.decide, collect=flag) for flag in (False, True))
        assert torch.equal(plain.output, collected.output)
        assert plain.consulted == []


# Targeted: decisions


def block(n: int = 4, vocabulary: int = 5, **changes) -> Block:
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


def test_everything_kept_ends_with_the_bonus_token():
    assert verify(block()).output.tolist() == [[1, 1, 1, 1, 3]]


def test_nothing_kept_emits_the_target_token():
    assert verify(block(), keep=False).output.tolist() == [[2, -1, -1, -1, -1]]


def test_max_overrides_counts_the_whole_request():
    result = verify(
        block(max_overrides=0),
        block(max_overrides=3),
        block(max_overrides=3, overrides_so_far=2),
        block(max_overrides=3, overrides_so_far=3),
        block(max_overrides=3, overrides_so_far=9),
        block(max_overrides=4),
    )
    assert result.overrides.tolist() == [0, 3, 1, 0, 0, 4]
    assert result.output[1].tolist() == [1, 1, 1, 2, -1]
    assert result.overrides_per_position.tolist() == [3, 2, 2, 1]


def test_exact_tokens_end_with_the_position_that_has_them_all_before_it():
    accepted = [True, True, False, False]
    result = verify(
        block(accepted_by_strict=accepted, exact_tokens=2),
        block(accepted_by_strict=accepted, exact_tokens=3),
        block(accepted_by_strict=accepted, exact_tokens=12, output_position=10),
        block(accepted_by_strict=accepted, exact_tokens=13, output_position=10),
    )
    assert result.overrides.tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("keep", [False, True])
def test_a_forced_decision_overrides_the_policy_and_what_lies_before_it_is_kept(keep):
    blocks = [block(output_position=10), block(output_position=10), block(output_position=10)]
    batch = Case(blocks, np.full((3, 4), keep)).batch()
    batch.requests.forced_at = np.array([12, 12, -1])
    batch.requests.forced_keep = np.array([True, False, True])
    result = verify_batch(batch, Case(blocks, np.full((3, 4), keep)).decide, collect=True)
    assert result.overrides.tolist() == ([4, 2, 4] if keep else [3, 2, 0])
    kept = {(int(c.request[i]), int(c.output_position[i])): bool(c.kept[i])
            for c in result.consulted for i in range(len(c.request))}  # fmt: skip
    assert kept[0, 12] is True
    assert kept[1, 12] is False


def test_requests_that_are_strict_leave_the_others_alone():
    result = verify(block(), block(arbitrated=False), block(junk=True), block())
    assert result.overrides.tolist() == [4, 0, 0, 4]
    assert result.num_mismatches == 9  # of arbitrated requests, the junk one included


@pytest.mark.parametrize("token", [-1, 5, 6, 2**31 - 1])
def test_a_draft_that_is_no_token_is_strict(token):
    result = verify(block(draft_tokens=[1, token, 1, 1]))
    assert result.output.tolist() == [[1, 2, -1, -1, -1]]
    assert result.overrides.tolist() == [1]


@pytest.mark.parametrize("value", [-INF, INF, math.nan])
def test_a_draft_without_a_finite_processed_logit_is_illegal(value):
    processed = torch.zeros(4, 5)
    processed[1, 1] = value
    result = verify(block(processed_target_logits=processed))
    assert result.output.tolist() == [[1, 2, -1, -1, -1]]


@pytest.mark.parametrize("name", ["raw_target_logits", "draft_logits"])
@pytest.mark.parametrize("oddity", ["nan elsewhere", "nan at the draft", "plus inf", "only minus inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_nan_is_strict_and_its_neighbours_are_not(name, oddity, dtype):
    logits = torch.zeros(4, 5, dtype=dtype)
    column, value = {
        "nan elsewhere": (4, math.nan),
        "nan at the draft": (1, math.nan),
        "plus inf": (4, INF),
        "only minus inf": (slice(None), -INF),
    }[oddity]
    logits[1, column] = value
    damaged = block(**{name: logits})
    result = verify(block(), damaged, block())
    assert result.output.tolist() == [[1, 1, 1, 1, 3], [1, 2, -1, -1, -1], [1, 1, 1, 1, 3]]
    assert result.overrides.tolist() == [4, 1, 4]
    assert verify_block(damaged, lambda statistics, position: True).tokens == [1, 2]


def test_rows_with_nan_are_not_recorded_as_consulted():
    # What is collected is trained on; one NaN among it would make every weight of the arbiter NaN.
    logits = torch.zeros(4, 5)
    logits[1, 4] = math.nan
    damaged = block(raw_target_logits=logits)
    recorded = consulted_rows(verify(block(), damaged), 1)
    truth = verify_block(damaged, lambda statistics, position: True)
    assert [position for position, _, _ in recorded] == truth.mismatches[: len(truth.statistics)] == [0]
    assert all(statistics.isfinite().all() for _, statistics, _ in recorded)


def test_draft_logits_are_asked_for_only_where_a_decision_needs_them():
    # Requests whose drafts are junk have no draft logits to ask for.
    batch = Case([block(), block(junk=True), block(arbitrated=False), block(max_overrides=1)], np.ones((4, 4), bool))
    asked: list[tuple[int, int]] = []

    def draft_logits(request: np.ndarray, position: np.ndarray) -> torch.Tensor:
        asked.extend(zip(request.tolist(), position.tolist(), strict=True))
        return torch.zeros(len(request), 5)

    verify_batch(replace(batch.batch(), draft_logits=draft_logits), batch.decide)
    assert sorted(asked) == [(0, 0), (0, 1), (0, 2), (0, 3), (3, 0)]


def test_the_policy_is_not_called_when_there_is_nothing_to_decide():
    def decide(rows: Mismatches, request: np.ndarray) -> tuple[torch.Tensor, None]:
        raise AssertionError("called")

    strict = [block(junk=True), block(arbitrated=False), block(accepted_by_strict=[True] * 4)]
    result = verify_batch(Case(strict, np.ones((3, 4), bool)).batch(), decide)
    assert result.output.tolist() == [[2, -1, -1, -1, -1], [2, -1, -1, -1, -1], [1, 1, 1, 1, 3]]


def test_an_empty_batch_is_verified():
    result = verify(block(n=0, num_speculative_tokens=3), block(n=0, num_speculative_tokens=3, bonus_token=4))
    assert result.output.tolist() == [[3, -1, -1, -1], [4, -1, -1, -1]]
    assert (result.num_mismatches, result.overrides_per_position.tolist()) == (0, [0, 0, 0])


def test_mismatches_describe_what_surrounds_them():
    """The figures outside the statistics that rules read: logits, tokens, native run, rest of the block, coins."""
    first = block(accepted_by_strict=[True, False, True, True], output_position=7)
    second = block(n=2, num_speculative_tokens=4, output_position=100)
    first.raw_target_logits[1] = torch.tensor([3.0, 1.0, 5.0, 0.0, 5.0])
    batch = replace(
        Case([first, second], np.ones((2, 4), bool)).batch(),
        acceptance_ratio=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        uniform=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
    )
    seen: list[Mismatches] = []

    def decide(rows: Mismatches, request: np.ndarray) -> tuple[torch.Tensor, None]:
        seen.append(rows)
        return torch.zeros(len(request), dtype=torch.bool), None

    verify_batch(batch, decide)
    (rows,) = seen
    assert rows.draft_token.tolist() == [1, 1]
    assert rows.target_token.tolist() == [2, 0]  # the lower index wins the ties 5 = 5 and 0 = 0
    assert rows.target_logit_draft.tolist() == [1.0, 0.0]
    assert rows.target_logit_top.tolist() == [5.0, 0.0]
    assert rows.output_position.tolist() == [8, 100]
    assert rows.natively_accepted_after.tolist() == [2, 0]
    assert rows.block_remaining.tolist() == [2, 1]
    assert rows.acceptance_ratio.tolist() == pytest.approx([0.2, 0.5])
    assert rows.uniform.tolist() == pytest.approx([0.8, 0.5])
    assert rows.top_k_entropy(2)[1].item() == pytest.approx(2 * 0.2 * math.log(5))

    verify_batch(replace(batch, acceptance_ratio=None, uniform=None), decide)
    assert seen[-1].acceptance_ratio.tolist() == [0, 0]  # greedy
    assert seen[-1].uniform.tolist() == [1, 1]


# Targeted: statistics


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p > 0 else -INF for p in probabilities]


def both(target: list[float], draft: list[float] | None, token: int) -> list[dict[str, float]]:
    """The logit statistics of one row, as the CPU path and as the reference compute them."""
    rows = torch.tensor([target])
    drafts = None if draft is None else torch.tensor([draft])
    cpu = logit_statistics(rows, drafts, torch.tensor([token]), rows.argmax(dim=-1))[0]
    context = reference.Context(position=0, num_speculative_tokens=1)
    truth = reference.row_statistics(rows[0], None if draft is None else drafts[0], token, context)
    return [dict(zip(NAMES[:10], row.tolist(), strict=False)) for row in (cpu, truth)]


def close(value: float):
    return pytest.approx(value, abs=2e-5)  # two or three float32 roundings at 100, the magnitude of the floor


def test_statistics_of_a_row_worked_out_by_hand():
    log2 = math.log(2)
    for row in both(logs(1 / 2, 1 / 4, 1 / 4), logs(1 / 4, 1 / 4, 1 / 2), token=2):
        assert row == {
            "target_logprob_draft": close(-2 * log2),
            "target_logprob_top": close(-log2),
            "target_top2_gap": close(log2),
            "target_entropy": close(1.5 * log2),
            "target_rank_draft": close(math.log1p(2)),
            "draft_logprob_draft": close(-log2),
            "draft_logprob_target": close(-2 * log2),
            "draft_top2_gap": close(log2),
            "draft_entropy": close(1.5 * log2),
            "kl_draft_target": close(0.25 * log2),  # 1/4 log 1/2 + 1/4 log 1 + 1/2 log 2
        }


def test_statistics_do_not_depend_on_a_shift_of_the_logits():
    target, draft = logs(0.7, 0.2, 0.1), logs(0.1, 0.6, 0.3)
    moved = both([x + 64 for x in target], [x - 64 for x in draft], 1)
    for plain, shifted in zip(both(target, draft, 1), moved, strict=True):
        assert shifted == {name: close(value) for name, value in plain.items()}


@pytest.mark.parametrize("token", range(5))
def test_rank_breaks_ties_by_index(token):
    ranks = [2, 0, 3, 1, 4]  # of the logits below; 5 = 5 and 2 = 2 are ties
    for row in both([2.0, 5.0, 2.0, 5.0, -INF], None, token):
        assert row["target_rank_draft"] == pytest.approx(math.log1p(ranks[token]), rel=1e-6)


def test_minus_inf_entries_rank_last_and_tie_by_index():
    for token, rank in ((1, 1), (2, 2), (0, 0)):
        for row in both([1.0, -INF, -INF], None, token):
            assert row["target_rank_draft"] == pytest.approx(math.log1p(rank), rel=1e-6)


@pytest.mark.parametrize("low", [-101.0, -1000.0, -1e30, -INF])
def test_logarithms_are_floored_and_gaps_bounded(low):
    for row in both([0.0, low], [low, 0.0], token=1):
        assert row["target_logprob_draft"] == LOGPROB_FLOOR == -100
        assert row["target_logprob_top"] == 0
        assert row["target_top2_gap"] == 100
        assert row["draft_logprob_draft"] == 0
        assert row["draft_logprob_target"] == -100
        assert row["draft_top2_gap"] == 100


def test_logarithms_above_the_floor_are_kept():
    for row in both([0.0, -99.0], None, token=1):
        assert row["target_logprob_draft"] == close(-99)
        assert row["target_top2_gap"] == close(99)


def test_entropy_with_minus_inf_entries_is_finite():
    for row in both([0.0, 0.0, -INF, -INF], [-INF, 0.0, -INF, -INF], token=0):
        assert row["target_entropy"] == close(math.log(2))
        assert row["draft_entropy"] == close(0)


def test_divergence_where_the_target_rules_a_token_out_is_finite():
    for row in both([0.0, -INF], [-INF, 0.0], token=1):
        assert row["kl_draft_target"] == close(100)  # q = (0, 1), p = (1, 0): log 1 - floor
    for row in both([0.0, -INF], [0.0, 0.0], token=1):
        assert row["kl_draft_target"] == close(50 - math.log(2))  # half of it, less the entropy of q
    for row in both([0.0, 1.0], [0.0, -INF], token=1):
        assert row["kl_draft_target"] == close(math.log1p(math.e))  # q = (1, 0): what q rules out costs nothing


def test_divergence_is_never_negative_nor_above_its_ceiling():
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e4):
        rows = torch.from_numpy(rng.normal(0, scale, (50, 30))).float()
        token = torch.zeros(50, dtype=torch.int64)
        same = logit_statistics(rows, rows, token, rows.argmax(dim=-1))[:, INDEX["kl_draft_target"]]
        assert (same == 0).all()
        other = logit_statistics(rows, rows.roll(1, 1), token, rows.argmax(dim=-1))[:, INDEX["kl_draft_target"]]
        assert ((other >= 0) & (other <= 100)).all()


@pytest.mark.parametrize("token", [0, 1])
def test_every_statistic_of_a_row_without_nan_is_finite(token):
    rows = [[1e38, -1e38], [-INF, -3e38], [0.0, 0.0], [88.0, -INF], [3e38, 3e38], [-1e4, 1e4]]
    for target in rows:
        for draft in rows:
            for row in both(target, draft, token):
                assert all(math.isfinite(value) for value in row.values()), (target, draft, row)


@pytest.mark.parametrize("where", ["target", "draft"])
@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.nan, 0.0], [-INF, -INF], [INF, 0.0], [math.nan, math.nan]])
def test_every_row_with_nan_or_without_a_distribution_shows_it(where, bad):
    good = [0.0, 1.0]
    for row in both(bad if where == "target" else good, bad if where == "draft" else good, token=1):
        assert any(math.isnan(value) for value in row.values())


def test_draft_statistics_are_zero_without_draft_logits():
    for row in both(logs(0.5, 0.3, 0.2), None, token=1):
        assert [row[name] for name in DRAFT_STATISTICS] == [0.0] * 5
        assert row["target_logprob_draft"] == close(math.log(0.3))
    result = verify(block(draft_logits=None))
    statistics = result.consulted[0].statistics
    assert (statistics[:, [INDEX[name] for name in DRAFT_STATISTICS]] == 0).all()


def test_context_statistics_of_a_block_worked_out_by_hand():
    # K = 8, n = 6. Argmax is 1 at positions 0, 2, 3 and 5, where the draft (1) matches; strict accepts only 0 and 3.
    raw = torch.zeros(6, 5)
    for position, top in enumerate([1, 4, 1, 1, 4, 1]):
        raw[position, top] = 2.0
    case = block(
        n=6,
        raw_target_logits=raw,
        accepted_by_strict=[True, False, False, True, False, False],
        num_speculative_tokens=8,
        output_position=20,
        overrides_so_far=3,
    )
    rows = {position: statistics.tolist()[10:] for position, statistics, _ in consulted_rows(verify(case), 0)}
    assert rows.keys() == {1, 2, 4, 5}
    log = math.log1p
    # block_position, lookahead_matches, matches_before, overrides_in_block, overrides_so_far, output_position
    assert rows[1] == pytest.approx([1 / 8, 2 / 8, 1 / 8, 0, log(3), log(21)])
    assert rows[2] == pytest.approx([2 / 8, 1 / 8, 1 / 8, 1, log(4), log(22)])
    assert rows[4] == pytest.approx([4 / 8, 1 / 8, 3 / 8, 2, log(5), log(24)])
    assert rows[5] == pytest.approx([5 / 8, 0 / 8, 3 / 8, 3, log(6), log(25)])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 40])
def test_top_k_entropy_sums_over_the_most_likely_tokens(k):
    probabilities = [0.05, 0.4, 0.25, 0.3, 0.0]
    expected = -sum(p * math.log(p) for p in sorted(probabilities, reverse=True)[:k] if p > 0)
    assert top_k_entropy(torch.tensor([logs(*probabilities)]), k).item() == pytest.approx(expected, abs=1e-6)


def test_schema_hash_tells_the_variants_apart_and_is_stable():
    assert schema_hash(True) != schema_hash(False)
    for draft_logits in (True, False):
        value = schema_hash(draft_logits)
        assert value == schema_hash(draft_logits)
        assert len(value) == 16
        assert int(value, 16) >= 0


def test_schema_is_the_documented_one():
    assert NUM_STATISTICS == len(NAMES) == len(set(NAMES)) == 16
    assert [INDEX[name] for name in NAMES] == list(range(16))
    assert set(DRAFT_STATISTICS) < set(NAMES)
