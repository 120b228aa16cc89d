"""The learner: its loss against hand-worked numbers, and a problem whose best policy is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import make_config

from vllm_cospec.arbiter import Arbiter, save_artefact
from vllm_cospec.errors import ConfigError, TrainingError
from vllm_cospec.kernels.statistics import INDEX
from vllm_cospec.training.config import LearnerConfig
from vllm_cospec.training.learning.advantages import Samples, branch_advantages, group_advantages
from vllm_cospec.training.learning.learner import (
    Learner,
    bernoulli_entropy,
    bernoulli_kl,
    initial_arbiter,
    policy_loss,
)
from vllm_cospec.training.rollout.episodes import Episodes


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_loss_of_unchanged_probabilities_is_minus_the_mean_advantage() -> None:
    logit = tensor(0.0, math.log(3))  # keep 0.5 and 0.75
    loss = policy_loss(logit, torch.tensor([True, False]), tensor(0.5, 0.25), tensor(2.0, -1.0), tensor(1, 1), 0.2)
    assert loss.item() == pytest.approx(-0.5)


def test_ratios_are_clipped_only_where_that_lowers_the_gain() -> None:
    logit = tensor(math.log(3)).expand(4)  # keep 0.75
    keep = torch.tensor([True, True, False, False])
    old = tensor(0.5, 0.5, 0.5, 0.5)  # ratios 1.5, 1.5, 0.5, 0.5
    loss = policy_loss(logit, keep, old, tensor(1, -1, 1, -1), tensor(1, 1, 1, 1), 0.2)
    # 1.2 (clipped), -1.5, 0.5, -0.8 (clipped)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)


def test_weights_decide_how_much_a_sample_counts() -> None:
    logit = tensor(0.0, 0.0)
    loss = policy_loss(logit, torch.tensor([True, True]), tensor(0.5, 0.5), tensor(1, 0), tensor(3, 1), 0.2)
    assert loss.item() == pytest.approx(-0.75)


def test_entropy_and_divergence_of_coins() -> None:
    p, q = 0.75, 0.5
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert bernoulli_entropy(tensor(math.log(3))).item() == pytest.approx(entropy)
    assert bernoulli_kl(tensor(math.log(3)), tensor(0.0)).item() == pytest.approx(divergence)
    assert bernoulli_kl(tensor(100.0), tensor(-100.0)).isfinite().all()


def test_the_initial_policy_keeps_with_the_configured_probability_everywhere() -> None:
    arbiter = initial_arbiter(LearnerConfig(initial_keep=0.3), seed=4)
    assert arbiter(torch.randn(50, 16) * 10).tolist() == pytest.approx([0.3] * 50, rel=1e-5)


def world(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mismatches whose draft token is right where the draft is surer than the target, and what keeping is worth."""
    x = generator.normal(size=(count, 16)).astype(np.float32)
    better = x[:, INDEX["draft_logprob_draft"]] > x[:, INDEX["target_logprob_top"]]
    return x, np.where(better, 1.0, 0.0)


def play(learner: Learner, generator: np.random.Generator, count: int) -> Episodes:
    """Episodes of one decision, two per problem, and a branch at each."""
    x, right = world(generator, count)
    x, right = np.repeat(x, 2, axis=0), np.repeat(right, 2)
    with torch.no_grad():
        probability = learner.arbiter(torch.from_numpy(x)).double().numpy()
    kept = generator.random(2 * count) < probability
    every = np.arange(2 * count)
    steps = np.full(2 * count, 5)
    return Episodes(
        every // 2, np.where(kept, right, 1 - right), 2 * steps, steps, np.zeros(2 * count, bool), [""] * (2 * count),
        every, x, kept, probability, every, every, np.ones(2 * count), right,
        1 - right, np.zeros(2 * count), np.zeros(2 * count),
    )  # fmt: skip


def accuracy(learner: Learner) -> float:
    x, right = world(np.random.default_rng(99), 4000)
    with torch.no_grad():
        return float(((learner.arbiter(torch.from_numpy(x)).numpy() > 0.5) == (right > 0.5)).mean())


@pytest.mark.parametrize("advantages", [branch_advantages, group_advantages])
def test_the_learner_reaches_the_known_best_policy(advantages: Callable[..., Any]) -> None:
    learner = Learner(LearnerConfig(initial_keep=0.4, entropy_bonus=1e-3), seed=1, updates=40)
    generator = np.random.default_rng(1)
    learner.normalise(play(learner, generator, 500).statistics)
    before = accuracy(learner)
    for _ in range(40):
        learner.update(advantages(play(learner, generator, 500), 0.0))
    assert before < 0.6
    assert accuracy(learner) > 0.95


def test_the_warm_start_learns_from_labels_alone_and_ignores_ties() -> None:
    learner = Learner(LearnerConfig(warm_start_epochs=20, minibatch_size=64), seed=1, updates=1)
    generator = np.random.default_rng(2)
    x, right = world(generator, 2000)
    difference = np.where(right > 0.5, 1.0, -1.0) * (generator.random(2000) < 0.4)
    learner.normalise(x)
    metrics = learner.warm_start(x, difference)
    assert metrics["warm_start_labels"] == (difference != 0).sum()
    assert accuracy(learner) > 0.95
    with pytest.raises(TrainingError, match="none of 2000 branches changed its answer"):
        learner.warm_start(x, np.zeros(2000))


def test_labels_of_all_branches_reach_the_known_best_policy() -> None:
    learner = Learner(LearnerConfig(objective="labels", weight_decay=1.0, initial_keep=0.4), seed=1, updates=40)
    x, right = world(np.random.default_rng(1), 4000)
    worth = 2 * right - 1
    learner.normalise(x)
    before = accuracy(learner)
    for update in range(1, 41):
        metrics = learner.fit(x[: 100 * update], worth[: 100 * update], 100)
    assert before < 0.6
    assert accuracy(learner) > 0.95
    assert metrics.keys() == {"loss", "entropy", "grad_norm"}


def test_labels_weigh_what_keeping_is_worth() -> None:
    # one mismatch, at which keeping was worth 3 once and cost 1 twice: 3 of 5 speak for it
    learner = Learner(LearnerConfig(objective="labels", learning_rate=0.02), seed=1, updates=100)
    x = np.zeros((4, 16), np.float32)
    worth = np.array([3.0, -1.0, 0.0, -1.0])
    for _ in range(100):
        learner.fit(x, worth, 4)
    assert learner.arbiter(torch.zeros(1, 16)).item() == pytest.approx(3 / 5, abs=0.02)


def test_labels_that_are_not_there_or_not_finite_change_nothing() -> None:
    learner = Learner(LearnerConfig(objective="labels", weight_decay=1.0), seed=1, updates=5)
    before = learner.weights()
    assert learner.fit(np.zeros((3, 16), np.float32), np.zeros(3), 3) == {}
    assert learner.fit(np.zeros((0, 16), np.float32), np.zeros(0), 0) == {}
    with pytest.raises(TrainingError, match="returns: 1 of 3 values are not finite"):
        learner.fit(np.zeros((3, 16), np.float32), np.array([1.0, math.nan, 0.0]), 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights().items())
    assert learner.updates_done == 2


def samples(advantage: float) -> Samples:
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    return Samples(x, np.ones(64, bool), np.full(64, 0.1), np.full(64, advantage), np.ones(64))


def test_a_loss_that_is_not_finite_is_named_and_changes_nothing() -> None:
    learner = Learner(LearnerConfig(), seed=1, updates=5)
    before = learner.weights()
    with pytest.raises(TrainingError, match="not finite"):
        learner.update(samples(math.nan))
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights().items())


def test_a_restored_learner_goes_on_bit_for_bit() -> None:
    straight = Learner(LearnerConfig(minibatch_size=16, kl_penalty=0.01), seed=1, updates=6)
    straight.normalise(samples(1.0).statistics)
    for _ in range(3):
        straight.update(samples(1.0))
    resumed = Learner(LearnerConfig(minibatch_size=16, kl_penalty=0.01), seed=1, updates=6)
    resumed.load_state(straight.state())
    for learner in (straight, resumed):
        for _ in range(3):
            learner.update(samples(-0.5))
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in straight.state().items())


def test_a_constant_statistic_keeps_its_scale() -> None:
    learner = Learner(LearnerConfig(), seed=1, updates=1)
    x = np.zeros((10, 16), np.float32)
    x[:, 0] = np.arange(10)
    learner.normalise(x)
    assert (learner.arbiter.scale > 0).all()
    assert learner.arbiter.scale[1] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_that_is_not_finite_reaches_the_weights(bad: float) -> None:
    learner = Learner(LearnerConfig(), seed=1, updates=5)
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    learner.normalise(x)
    before = learner.weights()
    broken = x.copy()
    broken[3, 2] = bad
    difference = np.ones(64)
    for attempt in (
        lambda: learner.normalise(broken),
        lambda: learner.warm_start(broken, difference),
        lambda: learner.warm_start(x, np.where(np.arange(64) == 5, bad, difference)),
        lambda: learner.update(replace(samples(1.0), statistics=broken)),
        lambda: learner.update(replace(samples(1.0), probability=np.full(64, bad))),
    ):
        with pytest.raises(TrainingError, match=r"of .* values are not finite"):
            attempt()
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights().items())


def test_it_goes_on_from_an_arbiter_with_its_standardisation(tmp_path: Path) -> None:
    first = Learner(LearnerConfig(hidden_sizes=(8,)), seed=3, updates=1)
    first.normalise(np.random.default_rng(0).normal(2, 3, (50, 16)).astype(np.float32))
    save_artefact(tmp_path / "a", first.arbiter, make_config(hidden_sizes=(8,)), "card")
    again = Learner(LearnerConfig(hidden_sizes=(8,), start=str(tmp_path / "a")), seed=4, updates=1)
    assert again.normalised
    x = torch.randn(20, 16)
    assert torch.equal(again.arbiter(x), first.arbiter(x))
    assert torch.equal(again.start(x), first.arbiter(x))


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    arbiter = Arbiter((8,))
    save_artefact(tmp_path / "a", arbiter, make_config(hidden_sizes=(8,)), "card")
    with pytest.raises(ConfigError, match=r"learner.start: .* has hidden sizes \[8\]"):
        Learner(LearnerConfig(start=str(tmp_path / "a")), seed=1, updates=1)
    with pytest.raises(ConfigError, match=r"learner.start: .*none"):
        Learner(LearnerConfig(start=str(tmp_path / "none")), seed=1, updates=1)
