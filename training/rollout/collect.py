"""Rolling out: a unit of problems in, episodes and branches out. Runs inside an actor, needs no Ray itself."""

from __future__ import annotations

import random
import time

import numpy as np

from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.rollout.branches import branch_request, choose, joined
from vllm_cospec.training.rollout.engine import Engine, Request
from vllm_cospec.training.rollout.episodes import Episodes, saved
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks.rewards import Reward, guarded


def roll_out(engine: Engine, unit: Unit, config: TrainConfig, reward: Reward) -> Episodes:
    """Generate the responses of a unit, and its branches.

    Args:
        engine: with the weights to use.
        unit: the problems.
        config: of the run.
        reward: of the task.

    Raises:
        RewardError: the reward function failed.
    """
    began = time.perf_counter()
    rollout, weight = config.rollout, config.learner.speed_weight
    engine.start_afresh()
    before = engine.counts()
    prompts = [engine.encode(problem.prompt) for problem in unit.problems]
    which = [i for i in range(len(prompts)) for _ in range(rollout.responses_per_prompt)]
    rng = random.Random(f"{unit.seed}/{unit.iteration}/{unit.first_problem}")
    requests = [
        Request(
            prompts[i], min(rollout.max_tokens, engine.max_model_len - len(prompts[i])), rng.getrandbits(31),
            rollout.temperature,
            {} if unit.threshold is None else {"cospec_threshold": unit.threshold},
        )
        for i in which
    ]  # fmt: skip
    start = time.perf_counter()
    responses = engine.run(requests)
    generating = time.perf_counter() - start
    counted = engine.counts() - before

    def score(i: int, text: str) -> float:
        return guarded(reward, unit.problems[i], text, config.task.reward_timeout_s)

    rewards = [score(i, response.text) for i, response in zip(which, responses, strict=True)]
    decisions = [(e, decision) for e, response in enumerate(responses) for decision in response.decisions]
    outcomes: dict[int, tuple[float, float]] = {}
    generated = sum(len(response.tokens) for response in responses)
    if config.learner.advantage == "branch" or unit.iteration < config.learner.warm_start_iterations:
        chosen = choose(responses, rollout.branches_per_response, rng)
        start = time.perf_counter()
        branches = engine.run([branch_request(requests[e], responses[e], d) for e, d in chosen])
        generating += time.perf_counter() - start
        generated += sum(len(branch.tokens) for branch in branches)
        number = {id(decision): m for m, (_, decision) in enumerate(decisions)}
        for (e, decision), branch in zip(chosen, branches, strict=True):
            whole = joined(engine, responses[e], decision, branch)
            if whole is None:  # a near-tie went the other way before the mismatch: nothing to compare
                continue
            own = rewards[e] + weight * saved(len(responses[e].emitted), len(responses[e].tokens))
            other = score(which[e], whole.text) + weight * saved(len(whole.emitted), len(whole.tokens))
            outcomes[number[id(decision)]] = (own, other) if decision.kept else (other, own)
    m = len(decisions)
    return Episodes(
        problem=np.array([unit.first_problem + i for i in which], np.int64),
        reward=np.array(rewards, np.float64),
        tokens=np.array([len(response.tokens) for response in responses], np.int64),
        steps=np.array([len(response.emitted) for response in responses], np.int64),
        capped=np.array([response.capped for response in responses], bool),
        texts=[response.text for response in responses],
        episode=np.array([e for e, _ in decisions], np.int64),
        statistics=np.stack([d.statistics.numpy() for _, d in decisions]) if m else np.zeros((0, 16), np.float32),
        kept=np.array([d.kept for _, d in decisions], bool),
        probability=np.array([d.probability for _, d in decisions], np.float64),
        output_position=np.array([d.output_position for _, d in decisions], np.int64),
        branch_decision=np.array(list(outcomes), np.int64),
        branch_keep=np.array([keep for keep, _ in outcomes.values()], np.float64),
        branch_drop=np.array([drop for _, drop in outcomes.values()], np.float64),
        drafts=counted.drafts,
        accepted=counted.accepted,
        generated_tokens=generated,
        generating_s=generating,
        busy_s=time.perf_counter() - began,
    )
