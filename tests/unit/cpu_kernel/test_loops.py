"""The compiled loops of the CPU path, each against what torch says."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels import cpu, loops, walk
from vllm_cospec.kernels.batch import LogitRows
from vllm_cospec.kernels.cpu import greedy_verdicts
from vllm_cospec.kernels.reach import NO_STOP, STOPS, undeliverable
from vllm_cospec.kernels.statistics import NUM_STATISTICS


@pytest.mark.parametrize("vocabulary", [1, 5, loops.CHUNK, 2 * loops.CHUNK + 100])
@pytest.mark.parametrize("padding", [0, 28])
def test_greedy_verdicts_are_those_of_argmax(vocabulary: int, padding: int) -> None:
    rng = np.random.default_rng(vocabulary)
    whole = torch.from_numpy(rng.normal(0, 2, (40, vocabulary + padding)).astype(np.float32))
    whole[:10] = whole[:10].round()  # ties
    whole[10:12] = -math.inf
    whole[12:16, rng.integers(vocabulary)] = math.nan
    whole[16, rng.integers(vocabulary)] = math.inf
    whole[17] -= 100  # all negative
    logits, rows = whole[:, :vocabulary], torch.arange(1, 40, dtype=torch.int32)
    best = logits.argmax(1)[1:]
    drafts = torch.where(torch.arange(39) % 3 == 0, best, torch.from_numpy(rng.integers(-1, vocabulary + 2, 39)))
    verdicts = greedy_verdicts(drafts.int(), rows, logits)
    assert verdicts.best.tolist() == best.tolist()
    assert verdicts.accepted.tolist() == (best == drafts).tolist()
    assert verdicts.drafts.tolist() == drafts.tolist()
    assert verdicts.rows.tolist() == rows.tolist()
    known = (drafts >= 0) & (drafts < vocabulary)
    finite = logits[1:].gather(1, drafts.clamp(0, vocabulary - 1).unsqueeze(1)).squeeze(1).isfinite()
    assert verdicts.legal.tolist() == (known & finite).tolist()


@pytest.mark.parametrize("hidden", [(7,), (32, 32), (256, 3)])
def test_scores_are_those_of_the_network(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    arbiter = Arbiter(hidden)
    arbiter.mean.copy_(torch.randn(NUM_STATISTICS))
    arbiter.scale.copy_(torch.rand(NUM_STATISTICS) + 0.1)
    statistics = torch.randn(50, NUM_STATISTICS) * 5
    statistics[3, 5] = 1e6  # clamped
    with torch.no_grad():
        expected = arbiter(statistics)
    found = arbiter.network().scores(statistics.numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=1e-6)
    assert found.std() > 0.1


def test_a_score_of_nan_keeps_nothing() -> None:
    statistics = np.zeros((1, NUM_STATISTICS), np.float32)
    statistics[0, 2] = math.nan
    assert not (Arbiter((4,)).network().scores(statistics) > 0).any()


def test_what_cannot_be_delivered_is_what_the_definition_says() -> None:
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(200):
        counts = rng.integers(0, 6, 5)
        drafts = torch.from_numpy(rng.integers(0, 6, counts.sum()))
        start = rng.integers(0, 12, 5)
        ends = np.full((5, 1 + STOPS), NO_STOP)
        ends[:, 0] = rng.integers(5, 15, 5)
        ends[:, 1:3] = rng.integers(0, 6, (5, 2))
        request = np.repeat(np.arange(5), counts)
        step = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        position = torch.from_numpy(start[request] + step)
        expected = undeliverable(drafts.roll(1), torch.from_numpy(step), position, torch.from_numpy(ends[request]))
        first = np.cumsum(counts) - counts
        found = [
            walk.undeliverable(drafts.numpy()[first[r] : first[r] + s], start[r] + s, ends[r])
            for r, s in zip(request, step, strict=True)
        ]
        assert found == expected.tolist()
        seen += int(expected.sum())
    assert seen > 200


@pytest.fixture
def signatures() -> Iterator[list[int]]:
    """How many types each loop is compiled for, before; compared with after."""
    cpu.warm_up(7)
    cpu.warm_up(0)
    everything = [f for module in (loops, walk) for f in vars(module).values() if hasattr(f, "nopython_signatures")]
    before = [len(function.nopython_signatures) for function in everything]
    yield before
    assert [len(function.nopython_signatures) for function in everything] == before


@pytest.mark.parametrize("padding", [0, 28])
def test_nothing_is_compiled_once_the_loops_are_warm(signatures: list[int], padding: int) -> None:
    assert len(signatures) > 10
    assert min(signatures) >= 1
    rows = [torch.zeros(3, 100 + padding)[:, :100] for _ in range(8)]
    every, zeros = np.empty((2, NUM_STATISTICS), np.float32), np.zeros(2, np.int64)
    for draft in (None, LogitRows(rows[:7], np.array([0, 6]), zeros), LogitRows([rows[0]] * 7, zeros, zeros)):
        flat = None if draft is None else cpu._Flat.of(draft.tensors, 100)
        cpu._fill_in(every, np.empty(2, bool), (*cpu._flat(rows[7]), 100), zeros, draft, flat, zeros, zeros)
    assert every[:, 9].tolist() == [0, 0]
