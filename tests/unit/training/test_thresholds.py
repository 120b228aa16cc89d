"""Answers at every threshold from few responses, against asking for every one of them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_cospec.runners.trace import Decision
from vllm_cospec.training.measure.fixed_sequence import threshold_sequence
from vllm_cospec.training.measure.thresholds import Sweep, sweep
from vllm_cospec.training.rollout.engine import Request, Response

THRESHOLDS = threshold_sequence([0.3, 0.5, 0.7])


class Toy:
    """Stands where an engine would: what comes next depends on the problem and on all decisions before."""

    def __init__(self) -> None:
        self.requests = 0

    def __call__(self, requests: list[Request]) -> list[Response]:
        self.requests += len(requests)
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Response:
        threshold = np.float32(request.extra["cospec_threshold"])
        tokens, emitted, decisions = [0], [1], []
        for step in range(request.prompt[0] % 5):
            rng = random.Random(repr((request.prompt, request.seed, tokens)))
            score = np.float32(rng.choice([rng.random(), rng.random() ** 9, 1 - rng.random() ** 9, 0.0, 0.5]))
            kept = bool(score > threshold)
            decisions.append(Decision("", step, 0, torch.zeros(16), kept, float(score)))
            tokens += [rng.randrange(100)] * (3 if kept else 1)
            emitted.append(3 if kept else 1)
        return Response(tokens, " ".join(map(str, tokens)), emitted, len(tokens) > 8, decisions)


def asked() -> list[Request]:
    return [Request([i], 10, seed=7 * i, extra={"cospec_exact_tokens": 0}) for i in range(40)]


def points(text: str) -> float:
    return float(sum(map(int, text.split())) % 2)


def test_each_answer_is_the_one_that_threshold_gives() -> None:
    toy, requests, known = Toy(), asked(), 0

    def tick(count: int) -> None:
        nonlocal known
        known += count

    found = sweep(toy, requests, THRESHOLDS, lambda i, text: points(text), tick)
    assert known == len(THRESHOLDS) * len(requests)
    assert toy.requests < 0.4 * known
    for t, threshold in enumerate(THRESHOLDS):
        each = [toy.answer(replace(r, extra={"cospec_threshold": threshold})) for r in requests]
        assert found.scores[t].tolist() == [points(response.text) for response in each]
        mismatches, overrides = found.counts(t)
        assert mismatches.tolist() == [len(response.decisions) for response in each]
        assert overrides.tolist() == [sum(d.kept for d in response.decisions) for response in each]
        tokens, steps = sum(len(r.tokens) for r in each), sum(len(r.emitted) for r in each)
        saved = [1 - len(response.emitted) / len(response.tokens) for response in each]
        assert found.steps_saved(t) == pytest.approx(np.mean(saved))
        figures = found.outcome(t).figures()
        assert figures["accuracy"] == pytest.approx(found.scores[t].mean())
        assert figures["acceptance_length"] == pytest.approx((tokens - 40) / (steps - 40))
        assert figures["override_rate"] == pytest.approx(overrides.sum() / mismatches.sum())
        assert figures["length_cap_hits"] == sum(response.capped for response in each)
    assert not found.counts(0)[1].any()  # the strictest threshold keeps nothing


def test_sweeps_of_parts_are_the_sweep_of_the_whole() -> None:
    def swept(requests: list[Request]) -> Sweep:
        return sweep(Toy(), requests, THRESHOLDS, lambda i, text: points(text))

    whole, merged = swept(asked()), Sweep.merge([swept(asked()[:13]), swept(asked()[13:])])
    assert (whole.scores == merged.scores).all()
    for t in range(len(THRESHOLDS)):
        assert whole.outcome(t).counts == merged.outcome(t).counts
        assert [list(column) for column in whole.counts(t)] == [list(column) for column in merged.counts(t)]


def test_responses_without_a_mismatch_are_asked_for_once() -> None:
    toy = Toy()
    found = sweep(toy, [Request([5], 10, 0), Request([10], 10, 0)], THRESHOLDS, lambda i, text: 1.0)
    assert toy.requests == 2
    assert [found.outcome(t).counts.acceptance_length for t in range(len(THRESHOLDS))] == [1.0] * len(THRESHOLDS)
