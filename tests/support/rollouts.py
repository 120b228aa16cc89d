"""Rolls out units on one real engine; tests/engine/test_rollout.py says what must hold of what comes of it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.training.config import RolloutConfig, TaskConfig, TrainConfig, load_train_config
from vllm_cospec.training.learning.advantages import group_advantages
from vllm_cospec.training.learning.learner import initial_arbiter
from vllm_cospec.training.rollout.branches import branch_request, joined
from vllm_cospec.training.rollout.collect import roll_out
from vllm_cospec.training.rollout.engine import Engine, Finished, Request, Response
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.placement import ACTOR_ENVIRONMENT
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import Problem, load_task
from vllm_cospec.training.tasks.grading import Graders

TIMES = {"generating_s", "busy_s"}


def same(a: Episodes, b: Episodes) -> bool:
    """Whether two roll-outs are equal in everything but how long they took."""
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(Episodes)
        if field.name not in TIMES
    )


def hangs_at_some(problem: Problem, text: str) -> float:
    """The task's score, but for the first problem, at which it never comes back."""
    while problem.prompt == load_task("demo").problems(seed=5, n=1, split="train")[0].prompt:
        time.sleep(0.1)
    return load_task("demo").score(problem, text)


def roads(engine: Engine, unit: Unit, temperature: float) -> dict[str, int]:
    """Take every branch with the decision that was taken anyway: it has to be the same road."""
    requests = [
        Request(engine.encode(p.prompt), 60, seed=100 + i, temperature=temperature, top_p=0.95 if temperature else 1.0)
        for i, p in enumerate(unit.problems)
    ]
    responses = engine.run(requests)
    at = [(e, d) for e, r in enumerate(responses) for d in r.decisions if d.output_position > d.block_position]
    again = []
    for e, decision in at:
        again.append(branch_request(requests[e], responses[e], decision, decision.kept))
    wholes = [
        joined(engine, responses[e], decision, branch)
        for (e, decision), branch in zip(at, engine.run(again), strict=True)
    ]
    pairs = [(whole, responses[e]) for (e, _), whole in zip(at, wholes, strict=True) if whole is not None]
    return {
        "branches": len(at),
        "kept": sum(d.kept for _, d in at),
        "compared": len(pairs),
        "same_tokens": sum(whole.tokens == own.tokens for whole, own in pairs),
        "same_steps": sum(whole.emitted == own.emitted for whole, own in pairs),
        "same_text": sum(whole.text == own.text for whole, own in pairs),
    }


def several_continuations(engine: Engine, unit: Unit, config: TrainConfig, graders: Graders) -> dict[str, Any]:
    """Branch sampled responses with three continuations of each action."""
    episodes = roll_out(engine, unit, config, graders)
    again = roll_out(engine, unit, config, graders)
    outcomes = np.concatenate([episodes.branch_keep, episodes.branch_drop])
    return {
        "repeatable": same(episodes, again),
        "branches": len(episodes.branch_decision),
        "continuations": episodes.continuations,
        "discarded": episodes.discarded,
        "thirds": bool(np.allclose(np.round(6 * outcomes), 6 * outcomes)),
        "between": int(((outcomes > 0) & (outcomes < 1)).sum()),
    }


def timeline(engine: Engine, unit: Unit, config: TrainConfig, graders: Graders) -> list[tuple[str, int, bool]]:
    """Roll out a unit; returns what happened, in order: begun or done, the response's seed, whether it is a branch."""
    events: list[tuple[str, int, bool]] = []
    wanted: list[Request] = []
    run, add = engine.run, engine._add

    def note(what: str, request: Request) -> None:
        events.append((what, request.seed, "cospec_branch" in request.extra))

    def noted_add(request_id: str, request: Request) -> None:
        wanted.append(request)
        note("begun", request)
        add(request_id, request)

    def noted_run(requests: Sequence[Request], finished: Finished) -> list[Response]:
        def done(number: int, response: Response) -> Iterable[Request]:
            note("done", wanted[number])
            return finished(number, response)

        return run(requests, done)

    with patch.object(engine, "_add", noted_add), patch.object(engine, "run", noted_run):
        roll_out(engine, unit, config, graders)
    return events


def main(path: Path) -> dict[str, Any]:
    """Run everything on one engine in this process, as a configuration has it."""
    os.environ |= ACTOR_ENVIRONMENT
    config = load_train_config(path)
    task = load_task("demo")
    graders = Graders(config.task)
    problems = task.problems(seed=5, n=48, split="train")
    first, second = (Unit(9, i, tuple(problems[24 * i : 24 * i + 24]), 24 * i, seed=3) for i in range(2))
    # undecided everywhere, and not everywhere alike: both actions have to occur
    arbiter = initial_arbiter(config.learner.model_copy(update={"initial_keep": 0.4}), seed=2)
    with torch.no_grad():
        arbiter.layers[-1].weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))  # type: ignore[operator]
    engine = Engine(config.pair, {"hidden_sizes": (32, 32), "state_dict": Arbiter((32, 32)).state_dict()})
    found: dict[str, Any] = {}

    engine.set_arbiter(arbiter.state_dict(), sample_actions=True)
    once = roll_out(engine, first, config, graders)
    other = roll_out(engine, second, config, graders)
    found["repeatable"] = same(once, roll_out(engine, first, config, graders))
    found["units_differ"] = not same(once, other)
    found["rewards"] = [task.score(problems[p], t) for p, t in zip(once.problem, once.texts, strict=True)]
    found["own_rewards"] = once.reward.tolist()
    found["branches"] = len(once.branch_decision)
    found["discarded"] = once.discarded
    first_blocks = [m for m in once.branch_decision if once.output_position[m] <= config.pair.num_speculative_tokens]
    found["branches_in_first_blocks"] = len(first_blocks)
    with torch.no_grad():
        probability = arbiter(torch.from_numpy(once.statistics)).double().numpy()
    found["decisions"], found["kept"] = len(once.kept), int(once.kept.sum())
    found["probability_error"] = float(np.abs(probability - once.probability).max())
    found["expected_kept"] = float(probability.sum())
    found["timeline"] = timeline(engine, first, config, graders)
    found["roads"] = roads(engine, first, 0.0)
    found["sampled_roads"] = roads(engine, first, 1.0)

    hanging = TaskConfig(reward="rollouts:hangs_at_some", reward_timeout_s=2.0)
    with Graders(hanging) as slow:
        hung = roll_out(engine, first, config, slow)
    found["hanging"] = {
        "failures": hung.failures,
        "rewards": hung.reward.tolist(),
        "same_texts": hung.texts == once.texts,
        "same_decisions": bool(np.array_equal(hung.statistics, once.statistics)),
    }
    found["repeatable_after_a_bad_reward"] = same(once, roll_out(engine, first, config, graders))

    for name, bias in (("always", 30.0), ("never", -30.0)):
        fixed = initial_arbiter(config.learner, seed=2)
        with torch.no_grad():
            fixed.layers[-1].bias.fill_(bias)  # type: ignore[operator]
        engine.set_arbiter(fixed.state_dict(), sample_actions=True)
        found[name] = float(roll_out(engine, first, config, graders).kept.mean())

    sampled = RolloutConfig(responses_per_prompt=4, temperature=1.0, max_tokens=60)
    learner = config.learner.model_copy(update={"advantage": "group", "warm_start_iterations": 0})
    engine.set_arbiter(arbiter.state_dict(), sample_actions=True)
    group = roll_out(engine, first, config.model_copy(update={"rollout": sampled, "learner": learner}), graders)
    texts = np.array(group.texts, object).reshape(24, 4)
    samples = group_advantages(group, 0.0)
    found["group"] = {
        "responses": len(group.reward),
        "problems": [int(p) for p in group.problem[:8]],
        "diverse": sum(len(set(row)) > 1 for row in texts),
        "branches": len(group.branch_decision),
        "samples": len(samples.keep),
        "nonzero": int((samples.advantage != 0).sum()),
    }
    several = config.rollout.model_copy(update={"temperature": 0.8, "top_p": 0.9, "continuations_per_action": 3})
    found["several"] = several_continuations(engine, first, config.model_copy(update={"rollout": several}), graders)
    graders.close()
    return found
