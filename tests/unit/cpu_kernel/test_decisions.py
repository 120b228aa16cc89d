"""The decisions of the CPU path, on blocks made for one question each."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_cases import INF, Case, block, consulted_rows, verify

from vllm_cospec.kernels.batch import LogitRows
from vllm_cospec.kernels.cpu import PLACEHOLDER, Found, verify_batch
from vllm_cospec.kernels.policies import Mismatches
from vllm_cospec.kernels.reference import verify_block


def test_everything_kept_ends_with_the_bonus_token() -> None:
    assert verify(block()).output.tolist() == [[1, 1, 1, 1, 3]]


def test_nothing_kept_emits_the_target_token() -> None:
    assert verify(block(), keep=False).output.tolist() == [[2, -1, -1, -1, -1]]


def test_max_overrides_counts_the_whole_request() -> None:
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


def test_exact_tokens_end_with_the_position_that_has_them_all_before_it() -> None:
    accepted = [True, True, False, False]
    result = verify(
        block(accepted_by_strict=accepted, exact_tokens=2),
        block(accepted_by_strict=accepted, exact_tokens=3),
        block(accepted_by_strict=accepted, exact_tokens=12, output_position=10),
        block(accepted_by_strict=accepted, exact_tokens=13, output_position=10),
    )
    assert result.overrides.tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("keep", [False, True])
def test_a_forced_decision_overrides_the_policy_and_what_lies_before_it_is_kept(keep: bool) -> None:
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


def test_requests_that_are_strict_leave_the_others_alone() -> None:
    result = verify(block(), block(arbitrated=False), block(junk=True), block())
    assert result.overrides.tolist() == [4, 0, 0, 4]
    assert result.num_mismatches == 8  # of arbitrated requests; what nobody proposed disagrees with nothing


@pytest.mark.parametrize("token", [-1, 5, 6, 2**31 - 1])
def test_a_draft_that_is_no_token_is_strict(token: int) -> None:
    result = verify(block(draft_tokens=[1, token, 1, 1]))
    assert result.output.tolist() == [[1, 2, -1, -1, -1]]
    assert result.overrides.tolist() == [1]
    assert result.num_mismatches == (1 if token < 0 else 2)  # a placeholder is no draft


@pytest.mark.parametrize("value", [-INF, INF, math.nan])
def test_a_draft_without_a_finite_processed_logit_is_illegal(value: float) -> None:
    processed = torch.zeros(4, 5)
    processed[1, 1] = value
    result = verify(block(processed_target_logits=processed))
    assert result.output.tolist() == [[1, 2, -1, -1, -1]]


@pytest.mark.parametrize("name", ["raw_target_logits", "draft_logits"])
@pytest.mark.parametrize("oddity", ["nan elsewhere", "nan at the draft", "plus inf", "only minus inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_nan_is_strict_and_its_neighbours_are_not(name: str, oddity: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 5, dtype=dtype)
    oddities: dict[str, tuple[int | slice, float]] = {
        "nan elsewhere": (4, math.nan),
        "nan at the draft": (1, math.nan),
        "plus inf": (4, INF),
        "only minus inf": (slice(None), -INF),
    }
    column, value = oddities[oddity]
    logits[1, column] = value
    damaged = replace(block(), **{name: logits})  # type: ignore[arg-type]
    result = verify(block(), damaged, block())
    assert result.output.tolist() == [[1, 1, 1, 1, 3], [1, 2, -1, -1, -1], [1, 1, 1, 1, 3]]
    assert result.overrides.tolist() == [4, 1, 4]
    assert verify_block(damaged, lambda statistics, position: True).tokens == [1, 2]


def test_rows_with_nan_are_not_recorded_as_consulted() -> None:
    # What is collected is trained on; one NaN among it would make every weight of the arbiter NaN.
    logits = torch.zeros(4, 5)
    logits[1, 4] = math.nan
    damaged = block(raw_target_logits=logits)
    recorded = consulted_rows(verify(block(), damaged), 1)
    truth = verify_block(damaged, lambda statistics, position: True)
    assert [position for position, _, _ in recorded] == truth.mismatches[: len(truth.statistics)] == [0]
    assert all(statistics.isfinite().all() for _, statistics, _ in recorded)


def test_draft_logits_are_asked_for_only_where_a_decision_needs_them() -> None:
    # Requests whose drafts are junk have no draft logits to ask for.
    batch = Case([block(), block(junk=True), block(arbitrated=False), block(max_overrides=1)], np.ones((4, 4), bool))
    asked: list[tuple[int, int]] = []

    def draft_logits(request: np.ndarray, position: np.ndarray) -> LogitRows:
        asked.extend(zip(request.tolist(), position.tolist(), strict=True))
        return LogitRows.of(torch.zeros(len(request), 5))

    verify_batch(replace(batch.batch(), draft_logits=draft_logits), batch.decide)
    assert sorted(asked) == [(0, 0), (0, 1), (0, 2), (0, 3), (3, 0)]


def test_the_policy_is_not_called_when_there_is_nothing_to_decide() -> None:
    def decide(found: Found) -> tuple[np.ndarray, None]:
        raise AssertionError("called")

    strict = [block(junk=True), block(arbitrated=False), block(accepted_by_strict=[True] * 4)]
    result = verify_batch(Case(strict, np.ones((3, 4), bool)).batch(), decide)
    assert result.output.tolist() == [[2, -1, -1, -1, -1], [2, -1, -1, -1, -1], [1, 1, 1, 1, 3]]


def test_an_empty_batch_is_verified() -> None:
    result = verify(block(n=0, num_speculative_tokens=3), block(n=0, num_speculative_tokens=3, bonus_token=4))
    assert result.output.tolist() == [[3, -1, -1, -1], [4, -1, -1, -1]]
    assert (result.num_mismatches, result.overrides_per_position.tolist()) == (0, [0, 0, 0])


def test_mismatches_describe_what_surrounds_them() -> None:
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

    def decide(found: Found) -> tuple[np.ndarray, None]:
        seen.append(found.mismatches())
        return np.zeros(len(found.request), bool), None

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


def test_what_cannot_be_delivered_is_neither_kept_nor_counted() -> None:
    case = Case([block(), block()], np.full((2, 4), True))
    batch = case.batch()
    batch.ends = batch.requests.output_position[:, None] + np.array([[2], [0]])
    result = verify_batch(batch, case.decide, collect=True)
    assert result.overrides.tolist() == [2, 0]  # nothing before the end of a response is lost
    assert result.num_mismatches == 2
    assert result.overrides_per_position.tolist() == [1, 1, 0, 0]
    assert sum(len(consulted.request) for consulted in result.consulted) == 2
    assert result.output[:, :3].tolist() == [[1, 1, 2], [2, PLACEHOLDER, PLACEHOLDER]]
