"""Labels from text: whom the text proves right at the mismatches verification would meet along it."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_cospec.training.pairs.code.labels import FIRST, lines_of, places


def test_each_mismatch_where_one_is_right_is_a_label() -> None:
    #         first  ok  draft right  ok  target right | new block: neither, draft right
    truth = [9, 1, 2, 3, 4, 5, 6, 7, 8]
    target = [9, 1, 2, 0, 4, 5, 0, 0, 8]
    draft = [9, 1, 2, 3, 4, 0, 0, 7, 8]
    found = list(places(target, draft, truth, first=1, k=4))
    assert [(at, right) for at, right, _ in found] == [(3, 1), (5, -1), (7, 1)]
    first, second, third = (others for _, _, others in found)
    assert first["block_position"] == pytest.approx(1 / 4)
    assert (first["matches_before"], first["lookahead_matches"]) == (pytest.approx(1 / 4), pytest.approx(1 / 4))
    assert first["output_position"] == pytest.approx(np.log1p(2))
    assert (second["overrides_in_block"], second["overrides_so_far"]) == (1.0, pytest.approx(np.log1p(1)))
    assert second["matches_before"] == pytest.approx(2 / 4)
    assert (third["block_position"], third["overrides_in_block"]) == (pytest.approx(1 / 4), 0.0)
    assert third["overrides_so_far"] == pytest.approx(np.log1p(1))


def test_the_token_behind_a_block_that_was_kept_whole_is_the_targets() -> None:
    truth = [1, 2, 3, 4, 5, 6]
    target = [1, 2, 3, 4, 0, 6]  # wrong at the bonus token: nobody is asked there
    draft = [1, 2, 3, 4, 5, 0]
    found = [(at, right, others["block_position"]) for at, right, others in places(target, draft, truth, 1, k=2)]
    assert found == [(5, -1, 0.0)]


def test_lines_lie_behind_the_context_and_end_within_the_window() -> None:
    is_end = np.array([False, True])
    truth = [0] * FIRST + [1, 0, 0, 1, 0, 1, 0, 0, 0]
    assert list(lines_of(truth, is_end)) == [(FIRST + 1, FIRST + 4)]
