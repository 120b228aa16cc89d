"""The statistics of the CPU path against rows worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import INF, block, consulted_rows, verify

from vllm_cospec.kernels import reference
from vllm_cospec.kernels.cpu import logit_statistics, top_k_entropy
from vllm_cospec.kernels.statistics import DRAFT_STATISTICS, INDEX, LOGPROB_FLOOR, NAMES, NUM_STATISTICS, schema_hash


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p > 0 else -INF for p in probabilities]


def both(target: list[float], draft: list[float] | None, token: int) -> list[dict[str, float]]:
    """The logit statistics of one row, as the CPU path and as the reference compute them."""
    rows = torch.tensor([target])
    draft_row = None if draft is None else torch.tensor(draft)
    drafts = None if draft_row is None else draft_row[None]
    cpu = logit_statistics(rows, drafts, torch.tensor([token]), rows.argmax(dim=-1))[0]
    context = reference.Context(position=0, num_speculative_tokens=1)
    truth = reference.row_statistics(rows[0], draft_row, token, context)
    return [dict(zip(NAMES[:10], row.tolist(), strict=False)) for row in (cpu, truth)]


def close(value: float) -> Any:
    return pytest.approx(value, abs=2e-5)  # two or three float32 roundings at 100, the magnitude of the floor


def test_statistics_of_a_row_worked_out_by_hand() -> None:
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


def test_statistics_do_not_depend_on_a_shift_of_the_logits() -> None:
    target, draft = logs(0.7, 0.2, 0.1), logs(0.1, 0.6, 0.3)
    moved = both([x + 64 for x in target], [x - 64 for x in draft], 1)
    for plain, shifted in zip(both(target, draft, 1), moved, strict=True):
        assert shifted == {name: close(value) for name, value in plain.items()}


@pytest.mark.parametrize("token", range(5))
def test_rank_breaks_ties_by_index(token: int) -> None:
    ranks = [2, 0, 3, 1, 4]  # of the logits below; 5 = 5 and 2 = 2 are ties
    for row in both([2.0, 5.0, 2.0, 5.0, -INF], None, token):
        assert row["target_rank_draft"] == pytest.approx(math.log1p(ranks[token]), rel=1e-6)


def test_minus_inf_entries_rank_last_and_tie_by_index() -> None:
    for token, rank in ((1, 1), (2, 2), (0, 0)):
        for row in both([1.0, -INF, -INF], None, token):
            assert row["target_rank_draft"] == pytest.approx(math.log1p(rank), rel=1e-6)


@pytest.mark.parametrize("low", [-101.0, -1000.0, -1e30, -INF])
def test_logarithms_are_floored_and_gaps_bounded(low: float) -> None:
    for row in both([0.0, low], [low, 0.0], token=1):
        assert row["target_logprob_draft"] == LOGPROB_FLOOR == -100
        assert row["target_logprob_top"] == 0
        assert row["target_top2_gap"] == 100
        assert row["draft_logprob_draft"] == 0
        assert row["draft_logprob_target"] == -100
        assert row["draft_top2_gap"] == 100


def test_logarithms_above_the_floor_are_kept() -> None:
    for row in both([0.0, -99.0], None, token=1):
        assert row["target_logprob_draft"] == close(-99)
        assert row["target_top2_gap"] == close(99)


def test_entropy_with_minus_inf_entries_is_finite() -> None:
    for row in both([0.0, 0.0, -INF, -INF], [-INF, 0.0, -INF, -INF], token=0):
        assert row["target_entropy"] == close(math.log(2))
        assert row["draft_entropy"] == close(0)


def test_divergence_where_the_target_rules_a_token_out_is_finite() -> None:
    for row in both([0.0, -INF], [-INF, 0.0], token=1):
        assert row["kl_draft_target"] == close(100)  # q = (0, 1), p = (1, 0): log 1 - floor
    for row in both([0.0, -INF], [0.0, 0.0], token=1):
        assert row["kl_draft_target"] == close(50 - math.log(2))  # half of it, less the entropy of q
    for row in both([0.0, 1.0], [0.0, -INF], token=1):
        assert row["kl_draft_target"] == close(math.log1p(math.e))  # q = (1, 0): what q rules out costs nothing


def test_divergence_is_never_negative_nor_above_its_ceiling() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e4):
        rows = torch.from_numpy(rng.normal(0, scale, (50, 30))).float()
        token = torch.zeros(50, dtype=torch.int64)
        same = logit_statistics(rows, rows, token, rows.argmax(dim=-1))[:, INDEX["kl_draft_target"]]
        assert (same == 0).all()
        other = logit_statistics(rows, rows.roll(1, 1), token, rows.argmax(dim=-1))[:, INDEX["kl_draft_target"]]
        assert ((other >= 0) & (other <= 100)).all()


@pytest.mark.parametrize("token", [0, 1])
def test_every_statistic_of_a_row_without_nan_is_finite(token: int) -> None:
    rows = [[1e38, -1e38], [-INF, -3e38], [0.0, 0.0], [88.0, -INF], [3e38, 3e38], [-1e4, 1e4]]
    for target in rows:
        for draft in rows:
            for row in both(target, draft, token):
                assert all(math.isfinite(value) for value in row.values()), (target, draft, row)


@pytest.mark.parametrize("where", ["target", "draft"])
@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.nan, 0.0], [-INF, -INF], [INF, 0.0], [math.nan, math.nan]])
def test_every_row_with_nan_or_without_a_distribution_shows_it(where: str, bad: list[float]) -> None:
    good = [0.0, 1.0]
    for row in both(bad if where == "target" else good, bad if where == "draft" else good, token=1):
        assert any(math.isnan(value) for value in row.values())


def test_draft_statistics_are_zero_without_draft_logits() -> None:
    for row in both(logs(0.5, 0.3, 0.2), None, token=1):
        assert [row[name] for name in DRAFT_STATISTICS] == [0.0] * 5
        assert row["target_logprob_draft"] == close(math.log(0.3))
    result = verify(block(draft_logits=None))
    statistics = result.consulted[0].statistics
    assert (statistics[:, [INDEX[name] for name in DRAFT_STATISTICS]] == 0).all()


def test_context_statistics_of_a_block_worked_out_by_hand() -> None:
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
def test_top_k_entropy_sums_over_the_most_likely_tokens(k: int) -> None:
    probabilities = [0.05, 0.4, 0.25, 0.3, 0.0]
    expected = -sum(p * math.log(p) for p in sorted(probabilities, reverse=True)[:k] if p > 0)
    assert top_k_entropy(torch.tensor([logs(*probabilities)]), k).item() == pytest.approx(expected, abs=1e-6)


def test_schema_hash_tells_the_variants_apart_and_is_stable() -> None:
    assert schema_hash(True) != schema_hash(False)
    for draft_logits in (True, False):
        value = schema_hash(draft_logits)
        assert value == schema_hash(draft_logits)
        assert len(value) == 16
        assert int(value, 16) >= 0


def test_schema_is_the_documented_one() -> None:
    assert NUM_STATISTICS == len(NAMES) == len(set(NAMES)) == 16
    assert [INDEX[name] for name in NAMES] == list(range(16))
    assert set(DRAFT_STATISTICS) < set(NAMES)
