"""Which positions can reach a response, against a statement about one position at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_cospec.kernels.reach import (
    ANSWERING,
    NO_STOP,
    STOPS,
    THINKING,
    UNKNOWN,
    ends_of,
    out_of_scope,
    part_after,
    parts,
    undeliverable,
)


def by_hand(before: list[int], position: int, limit: int, stops: set[int]) -> bool:
    """Of a row behind these drafts of its own block."""
    return position >= limit or any(token in stops for token in before)


def test_a_row_is_undeliverable_where_the_response_is_full_or_has_ended_before_it() -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        counts = rng.integers(1, 7, rng.integers(1, 5))
        tokens = [rng.integers(-1, 6, count).tolist() for count in counts]  # entry 0 is the block's last input
        starts, limits = rng.integers(0, 9, len(counts)), rng.integers(1, 12, len(counts))
        stops = [set(rng.choice(6, rng.integers(0, 3), replace=False).tolist()) for _ in counts]
        expected = [
            by_hand(own[1 : i + 1], int(start) + i, int(limit), stop)
            for own, start, limit, stop in zip(tokens, starts, limits, stops, strict=True)
            for i in range(len(own))
        ]
        step = torch.cat([torch.arange(int(count)) for count in counts])
        ends = torch.tensor([ends_of(int(limit), sorted(stop)) for limit, stop in zip(limits, stops, strict=True)])
        got = undeliverable(
            torch.tensor([token for own in tokens for token in own]),
            step,
            torch.from_numpy(np.repeat(starts, counts)) + step,
            ends.repeat_interleave(torch.from_numpy(counts), dim=0),
        )
        assert got.tolist() == expected
        found += expected
    assert 0.2 < np.mean(found) < 0.8


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], [NO_STOP] * STOPS), ([3, 5], [3, 5] + [NO_STOP] * (STOPS - 2)), (list(range(20)), list(range(STOPS)))],
)
def test_the_ends_of_a_response_have_one_size(tokens: list[int], expected: list[int]) -> None:
    assert ends_of(7, tokens) == [7, *expected]
    assert ends_of(2**40, [])[0] == 2**31 - 1


def test_the_part_of_a_row_follows_the_markers_in_front_of_it() -> None:
    rng, found = np.random.default_rng(1), []
    for _ in range(300):
        counts = rng.integers(1, 8, rng.integers(1, 5))
        tokens = [rng.integers(0, 9, count).tolist() for count in counts]
        for own in tokens:
            if rng.random() < 0.5:
                own[0] = -1  # looked at already
        starts, expected = rng.integers(0, 3, len(counts)), []
        for own, start in zip(tokens, starts, strict=True):
            part = int(start)
            for token in own:
                part = {3: THINKING, 4: ANSWERING}.get(token, part)
                expected.append(part)
            assert part == part_after(int(start), own, (3, 4))
        step = torch.cat([torch.arange(int(count)) for count in counts])
        flat = torch.tensor([token for own in tokens for token in own])
        got = parts(flat, step, (3, 4), torch.from_numpy(np.repeat(starts, counts)))
        assert got.tolist() == expected
        found += expected
    assert set(found) == {ANSWERING, THINKING, UNKNOWN}
    assert not len(parts(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), (3, 4), torch.zeros(0)))


def test_a_scope_closes_the_other_part_and_what_is_unknown() -> None:
    part = torch.tensor([ANSWERING, THINKING, UNKNOWN] * 3)
    scope = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert out_of_scope(part, scope).tolist() == [False, False, False, True, False, True, False, True, True]
