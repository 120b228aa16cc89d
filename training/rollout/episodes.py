"""Rollouts: a unit of problems in, episodes and branches out. Runs inside an actor, needs no Ray itself.

A branch is the road not taken at one mismatch of a response: the target has greedily written the response up to the
last token it emitted before the mismatch's block, so a request whose prompt ends just before that token finds itself in
the same block again, and the decision there is forced the other way. What follows uses the same random numbers.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.rollout.engine import Blocks, Engine, Request, Response
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.rewards import Reward, guarded


@dataclass(frozen=True)
class Unit:
    """What an actor does at a time. Its result depends on nothing else but the weights."""

    iteration: int
    index: int  # within the iteration
    problems: tuple[Problem, ...]
    first_problem: int  # number of the first one within the iteration
    seed: int
    threshold: float | None = None  # None: actions are sampled, as training wants them

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Identifies the unit, and each of the parts it may be taken into."""
        return self.iteration, self.index, self.first_problem, len(self.problems)

    def split(self) -> list[Unit]:
        """One unit per problem."""
        return [
            Unit(self.iteration, self.index, (problem,), self.first_problem + i, self.seed, self.threshold)
            for i, problem in enumerate(self.problems)
        ]


@dataclass
class Episodes:
    """E responses with M decisions in all, and B branches. Arrays, so that they travel cheaply."""

    problem: np.ndarray  # [E] int64, number within the iteration
    reward: np.ndarray  # [E] float64, the task's
    tokens: np.ndarray  # [E] int64
    steps: np.ndarray  # [E] int64, of the target
    capped: np.ndarray  # [E] bool, ended by max_tokens
    texts: list[str]
    episode: np.ndarray  # [M] int64
    statistics: np.ndarray  # [M, 16] float32
    kept: np.ndarray  # [M] bool
    probability: np.ndarray  # [M] float64, of keeping, when it was decided
    output_position: np.ndarray  # [M] int64
    branch_decision: np.ndarray  # [B] int64, which decision
    branch_keep: np.ndarray  # [B] float64, return when its draft token is kept
    branch_drop: np.ndarray  # [B] float64, return when it is not
    drafts: int = 0  # blocks verified, as vLLM counts
    accepted: int = 0  # draft tokens kept in them
    generated_tokens: int = 0  # branches included
    generating_s: float = 0.0
    busy_s: float = 0.0

    @staticmethod
    def merge(parts: list[Episodes]) -> Episodes:
        """Put parts end to end; indices are moved along."""
        if not parts:
            empty = np.zeros(0, np.int64)
            return Episodes(
                empty, np.zeros(0), empty, empty, np.zeros(0, bool), [], empty, np.zeros((0, 16), np.float32),
                np.zeros(0, bool), np.zeros(0), empty, empty, np.zeros(0), np.zeros(0),
            )  # fmt: skip
        episodes = np.cumsum([0, *(len(p.problem) for p in parts)])
        decisions = np.cumsum([0, *(len(p.kept) for p in parts)])

        def joined(name: str, offsets: np.ndarray | None = None) -> np.ndarray:
            arrays = [getattr(p, name) for p in parts]
            return np.concatenate(arrays if offsets is None else [a + o for a, o in zip(arrays, offsets, strict=False)])

        return Episodes(
            joined("problem"), joined("reward"), joined("tokens"), joined("steps"),
            joined("capped"), [text for p in parts for text in p.texts],
            joined("episode", episodes), joined("statistics"), joined("kept"),
            joined("probability"), joined("output_position"), joined("branch_decision", decisions),
            joined("branch_keep"), joined("branch_drop"),
            *(sum(getattr(p, name) for p in parts)
              for name in ("drafts", "accepted", "generated_tokens", "generating_s", "busy_s")),
        )  # fmt: skip


def saved(steps: Any, tokens: Any) -> Any:
    """Share of target steps saved, 1 - steps / tokens, in [0, 1)."""
    return 1 - steps / np.maximum(tokens, 1)


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
    before = engine.blocks()
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
    after = engine.blocks()

    def score(i: int, text: str) -> float:
        return guarded(reward, unit.problems[i], text, config.task.reward_timeout_s)

    rewards = [score(i, response.text) for i, response in zip(which, responses, strict=True)]
    decisions = [(e, decision) for e, response in enumerate(responses) for decision in response.decisions]
    outcomes: dict[int, tuple[float, float]] = {}
    generated = sum(len(response.tokens) for response in responses)
    if config.learner.advantage == "branch" or unit.iteration < config.learner.warm_start_iterations:
        chosen = _choose(responses, rollout.branches_per_response, rng)
        start = time.perf_counter()
        branches = engine.run([_branch(requests[e], responses[e], d) for e, d in chosen])
        generating += time.perf_counter() - start
        generated += sum(len(branch.tokens) for branch in branches)
        number = {id(decision): m for m, (_, decision) in enumerate(decisions)}
        for (e, decision), branch in zip(chosen, branches, strict=True):
            whole = _joined(engine, responses[e], decision, branch)
            if whole is None:  # a near-tie went the other way before the mismatch: nothing to compare
                continue
            own = rewards[e] + weight * saved(len(responses[e].emitted), len(responses[e].tokens))
            other = score(which[e], whole.text) + weight * saved(len(whole.emitted), len(whole.tokens))
            outcomes[number[id(decision)]] = (own, other) if decision.kept else (other, own)
    m = len(decisions)
    counted = Blocks(after.drafts - before.drafts, after.accepted - before.accepted)
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


def _choose(responses: list[Response], per_response: int, rng: random.Random) -> list[tuple[int, Any]]:
    """Choose mismatches to branch at, each of a response's with the same chance.

    Those of a block at the very beginning are left out: no token stands before it that a prompt could end with.
    """
    chosen = []
    for e, response in enumerate(responses):
        possible = [d for d in response.decisions if d.output_position > d.block_position]
        chosen += [(e, d) for d in rng.sample(possible, min(per_response, len(possible)))]
    return chosen


def _written(decision: Any) -> int:
    """Return how many tokens of the response a branch at ``decision`` begins with: all but the one before its block."""
    return decision.output_position - decision.block_position - 1


def _branch(request: Request, response: Response, decision: Any) -> Request:
    """Return the request that takes the other road at ``decision``."""
    written = _written(decision)
    return Request(
        prompt=request.prompt + response.tokens[:written],
        max_tokens=request.max_tokens - written,
        seed=request.seed,
        temperature=request.temperature,
        extra=request.extra
        | {
            "cospec_branch": {
                "written": written,
                "overrides": sum(d.kept for d in response.decisions if d.output_position <= written),
                "decided_at": decision.output_position,
                "keep": not decision.kept,
            }
        },
    )


def _joined(engine: Engine, response: Response, decision: Any, branch: Response) -> Response | None:
    """Return the whole response of which ``branch`` is the end; None when it left the road before the mismatch."""
    written = _written(decision)
    until = decision.output_position - written
    if branch.tokens[:until] != response.tokens[written : written + until]:
        return None
    if not any(d.output_position == decision.output_position for d in branch.decisions):
        return None
    tokens = response.tokens[:written] + branch.tokens
    ends = np.cumsum(response.emitted)
    before = int(np.searchsorted(ends, written + 1)) + 1  # the branch's first token ended one of these steps
    return Response(
        tokens=tokens,
        text=engine.decode(tokens),
        emitted=[*response.emitted[:before], *branch.emitted[1:]],
        capped=branch.capped,
    )
