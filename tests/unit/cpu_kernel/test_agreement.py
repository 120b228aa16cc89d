"""The CPU path against the reference, by regime. Decisions are compared exactly: the policy of these tests is a table
over (request, position), so that no rounding can tip it.
"""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from kernel_cases import INF, REGIMES, Case, cases, check_against_reference, consulted_rows, decisions

from vllm_cospec.kernels.cpu import PLACEHOLDER, verify_batch
from vllm_cospec.kernels.reference import verify_block
from vllm_cospec.kernels.statistics import NUM_STATISTICS


@pytest.mark.parametrize("name", REGIMES)
def test_cpu_path_equals_the_reference(name: str) -> None:
    for number, case in enumerate(cases(name)):
        k = case.blocks[0].num_speculative_tokens
        width = k if number % 3 == 0 else max(len(block.draft_tokens) for block in case.blocks)
        batch = case.batch(width, token_dtype=torch.int32 if number % 2 else torch.int64)
        check_against_reference(case, verify_batch(batch, case.decide, collect=True), width)


def test_regimes_reach_what_they_are_there_for() -> None:
    """An agreement over thousands of requests in which nothing is ever overridden would mean nothing."""
    total = 0
    seen = dict.fromkeys(("complete", "override", "several_overrides", "stopped_by_policy", "not_consulted", "nan"), 0)
    for name in REGIMES:
        for case in cases(name) if "wide" not in name else []:
            total += len(case.blocks)
            for block, row in zip(case.blocks, case.keep, strict=True):
                truth = verify_block(block, decisions(row))
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


def test_a_policy_that_reads_statistics_decides_as_in_the_reference() -> None:
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
        result = verify_batch(case.batch(), lambda found: (found.statistics @ weights.numpy() > middle.item(), None))
        for tokens, emitted in zip(expected, result.output.tolist(), strict=True):
            assert emitted == tokens + [PLACEHOLDER] * (len(emitted) - len(tokens))
        compared += 1
        overrides += int(result.overrides.sum())
        mismatches += result.num_mismatches
    assert compared >= 100
    assert 0.2 < overrides / mismatches < 0.8


@pytest.mark.parametrize("name", ["mixed", "limits", "nan_and_inf", "saturated_bf16"])
def test_permuting_the_requests_permutes_the_results(name: str) -> None:
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
def test_inputs_are_not_modified(name: str) -> None:
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


def test_collecting_changes_no_decision() -> None:
    for case in cases("mixed")[:20]:
        plain, collected = (verify_batch(case.batch(), case.decide, collect=flag) for flag in (False, True))
        assert torch.equal(plain.output, collected.output)
        assert plain.consulted == []
