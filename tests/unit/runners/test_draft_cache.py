"""How far the drafter has followed: whatever it missed is a hole, for the request and for who finds its blocks."""

import random
from typing import Any

import pytest

from vllm_cospec.runners.draft_cache import DraftCache, Span

SIZE = 4


@pytest.fixture
def cache() -> DraftCache:
    return DraftCache(num_blocks=32, block_size=SIZE)


def step(cache: DraftCache, *spans: Any, drafted: bool = True) -> set[str] | None:
    """One step of the target, followed by the drafter or not; returns the whole ones among the requests."""
    cache.computed([Span(*span) for span in spans])
    if not drafted:
        return None
    return {span[0] for span, whole in zip(spans, cache.drafted(), strict=True) if whole}


def test_a_request_the_drafter_always_follows_is_whole(cache: DraftCache) -> None:
    cache.enter("a", 0)
    assert step(cache, ("a", [1, 2], 0, 5)) == {"a"}
    assert step(cache, ("a", [1, 2], 5, 6)) == {"a"}
    assert step(cache, ("a", [1, 2, 3], 6, 12)) == {"a"}


def test_rejected_drafts_are_computed_again_and_leave_no_hole(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1, 2, 3], 0, 4))
    step(cache, ("a", [1, 2, 3], 4, 10))  # five drafts, of which four turn out rejected
    assert step(cache, ("a", [1, 2, 3], 6, 12)) == {"a"}


def test_a_step_without_the_drafter_leaves_a_hole_for_good(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1, 2], 0, 3))
    step(cache, ("a", [1, 2], 3, 4), drafted=False)
    assert step(cache, ("a", [1, 2], 4, 5)) == set()
    assert step(cache, ("a", [1, 2], 5, 6)) == set()


def test_a_first_step_without_the_drafter_is_a_hole_as_well(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1, 2], 0, 3), drafted=False)
    assert step(cache, ("a", [1, 2], 3, 4)) == set()


def test_the_others_of_the_batch_do_not_suffer(cache: DraftCache) -> None:
    for name in "ab":
        cache.enter(name, 0)
    step(cache, ("a", [1, 2], 0, 3), ("b", [3, 4], 0, 3))
    step(cache, ("a", [1, 2], 3, 4), drafted=False)
    assert step(cache, ("a", [1, 2], 4, 5), ("b", [3, 4], 3, 4)) == {"b"}


def test_a_request_that_waits_a_step_is_whole(cache: DraftCache) -> None:
    for name in "ab":
        cache.enter(name, 0)
    step(cache, ("a", [1], 0, 2), ("b", [2], 0, 2))
    step(cache, ("a", [1], 2, 3))
    assert step(cache, ("b", [2], 2, 3)) == {"b"}


def test_what_is_found_in_the_cache_is_as_whole_as_whoever_filled_it(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1, 2, 3], 0, 9))
    cache.enter("b", 8)
    assert step(cache, ("b", [1, 2, 4], 8, 10)) == {"b"}
    step(cache, ("a", [1, 2, 3], 9, 12), drafted=False)
    step(cache, ("a", [1, 2, 3, 5], 12, 13))
    cache.enter("c", 12)
    assert step(cache, ("c", [1, 2, 3, 6], 12, 14)) == set()
    cache.enter("d", 8)
    assert step(cache, ("d", [1, 2, 7], 8, 11)) == {"d"}


def test_a_prefix_that_came_from_elsewhere_was_not_seen(cache: DraftCache) -> None:
    cache.enter("a", 8)
    assert step(cache, ("a", [1, 2, 3], 8, 10)) == set()
    cache.enter("b", 12)
    assert step(cache, ("b", [1, 2, 3, 4], 12, 13)) == set()  # what was computed behind a hole is one


def test_blocks_that_are_filled_from_elsewhere_are_no_longer_seen(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1, 2], 0, 8))
    cache.forget(["a"])
    cache.reset([2])
    cache.enter("b", 8)
    assert step(cache, ("b", [1, 2, 3], 8, 9)) == set()
    cache.enter("c", 4)
    assert step(cache, ("c", [1, 4], 4, 5)) == {"c"}


def test_a_request_the_drafter_cannot_see_is_never_whole(cache: DraftCache) -> None:
    cache.enter("a", -1)
    assert step(cache, ("a", [1], 0, 4)) == set()
    cache.enter("b", 4)
    assert step(cache, ("b", [1, 2], 4, 5)) == set()


def test_a_block_that_is_given_away_keeps_nothing_of_its_last_owner(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1], 0, 4))
    cache.forget(["a"])
    cache.enter("b", 0)
    step(cache, ("b", [1], 0, 4), drafted=False)
    step(cache, ("b", [1, 2], 4, 5))
    cache.enter("c", 4)
    assert step(cache, ("c", [1, 3], 4, 5)) == set()


@pytest.mark.parametrize("order", ["writer first", "reader first"])
def test_a_prefix_may_be_computed_in_the_step_that_finds_it(cache: DraftCache, order: str) -> None:
    cache.enter("writer", 0)
    cache.enter("reader", 4)
    cache.enter("third", 8)
    spans = [("writer", [1, 2], 0, 5), ("reader", [1, 3, 4], 4, 9), ("third", [1, 3, 5], 8, 9)]
    assert step(cache, *(spans if order == "writer first" else spans[::-1])) == {"writer", "reader", "third"}


def test_a_preempted_request_is_whole_again_once_it_is_computed_again(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1, 2], 0, 5))
    step(cache, ("a", [1, 2], 5, 6), drafted=False)
    assert step(cache, ("a", [1, 2], 6, 7)) == set()
    cache.enter("a", 4)  # preempted, and back with its first block in the cache
    assert step(cache, ("a", [1, 5], 4, 7)) == {"a"}


def test_a_copied_block_is_as_whole_as_its_original(cache: DraftCache) -> None:
    cache.enter("a", 0)
    step(cache, ("a", [1], 0, 3))
    cache.copy(1, 2)
    cache.copy(9, 3)
    cache.enter("b", 3)
    cache.enter("c", 3)
    assert step(cache, ("b", [2], 3, 4), ("c", [3], 3, 4)) == {"b"}


def test_blocks_a_sliding_window_has_passed_are_not_asked_for(cache: DraftCache) -> None:
    cache.enter("a", 8)
    cache.enter("b", 0)
    assert step(cache, ("b", [5, 6, 7], 0, 9)) == {"b"}
    cache.enter("c", 8)
    assert step(cache, ("a", [0, 3, 4], 8, 9), ("c", [0, 6, 8], 8, 9)) == {"c"}


def test_against_a_drafter_that_writes_down_every_token() -> None:
    """Random steps, skips, preemptions and shared prefixes, against a model with a flag for every slot."""
    rng = random.Random(0)
    for _ in range(200):
        blocks, cache = 12, DraftCache(num_blocks=13, block_size=SIZE)
        filled: dict[
            tuple[int, int], bool
        ] = {}  # slot -> whether the drafter holds, for all before it, what the target holds
        tables: dict[str, list[int]] = {}
        lengths: dict[str, int] = {}
        whole: dict[str, bool] = {}
        free = list(range(1, blocks + 1))
        for turn in range(30):
            if len(tables) < 3 and len(free) >= 3 and rng.random() < 0.5:
                name = f"r{turn}"
                shared: list[int] = []
                if tables and rng.random() < 0.5:
                    other = rng.choice(list(tables))
                    shared = tables[other][: lengths[other] // SIZE]
                own = [free.pop() for _ in range(3)]
                tables[name], lengths[name] = shared + own, len(shared) * SIZE
                whole[name] = all(filled.get((block, i)) for block in shared for i in range(SIZE))
                cache.enter(name, lengths[name])
            batch = [name for name in tables if rng.random() < 0.8]
            drafted = rng.random() < 0.85
            spans = []
            for name in batch:
                end = min(lengths[name] + rng.randint(1, 5), len(tables[name]) * SIZE)
                if end > lengths[name]:
                    spans.append(Span(name, tables[name], lengths[name], end))
            cache.computed(spans)
            for span in spans:
                whole[span.request_id] &= drafted
                for token in range(span.start, span.end):
                    filled[span.blocks[token // SIZE], token % SIZE] = whole[span.request_id]
                lengths[span.request_id] = span.end
            if drafted:
                assert cache.drafted() == [whole[span.request_id] for span in spans]
            for name in list(tables):
                if lengths[name] == len(tables[name]) * SIZE:
                    used = [block for other, table in tables.items() if other != name for block in table]
                    free += [block for block in tables.pop(name) if block not in used]
                    cache.forget([name])
