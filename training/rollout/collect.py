"""Rolling out: a unit of problems in, episodes and branches out. Runs inside an actor, needs no Ray itself.

A response's branches start, and its answer is graded, as soon as it is done; nothing waits for the slowest of a unit.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.rollout.branches import branch_request, choose, joined
from vllm_cospec.training.rollout.engine import Engine, Request, Response
from vllm_cospec.training.rollout.episodes import Episodes, saved
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks.grading import Grade, Graders


def roll_out_with(
    engine: Engine, graders: Graders, config: TrainConfig, unit: Unit, weights: dict[str, Any]
) -> Episodes:
    """Roll out a unit with these weights; actions are sampled where the unit has no threshold."""
    engine.set_arbiter(weights, sample_actions=unit.threshold is None)
    return roll_out(engine, unit, config, graders)


def roll_out(engine: Engine, unit: Unit, config: TrainConfig, graders: Graders) -> Episodes:
    """Generate the responses of a unit, and its branches.

    Args:
        engine: with the weights to use.
        unit: the problems.
        config: of the run.
        graders: of the task.
    """
    return _Rollout(engine, unit, config, graders).run()


@dataclass
class _Branch:
    """A road from a decision, and what became of it."""

    response: int
    decision: Any
    weight: float  # mismatches the decision stands for
    keep: bool
    reseed: int | None = None
    whole: Response | None = None
    grade: Future[Grade] | None = None


class _Rollout:
    def __init__(self, engine: Engine, unit: Unit, config: TrainConfig, graders: Graders):
        self._engine, self._unit, self._config, self._graders = engine, unit, config, graders
        self._rng = random.Random(f"{unit.seed}/{unit.iteration}/{unit.first_problem}")
        warming = unit.iteration < config.learner.warm_start_iterations
        self._branching = unit.branches and (config.learner.advantage == "branch" or warming)
        self._which = [i for i in range(len(unit.problems)) for _ in range(config.rollout.responses_per_prompt)]
        self._requests: list[Request] = []
        self._grades: dict[int, Future[Grade]] = {}
        self._responses: dict[int, Response] = {}
        self._branches: list[_Branch] = []

    def run(self) -> Episodes:
        began = time.perf_counter()
        self._engine.start_afresh()
        rollout = self._config.rollout
        prompts = [self._engine.encode(problem.prompt) for problem in self._unit.problems]
        extra = {} if self._unit.threshold is None else {"cospec_threshold": self._unit.threshold}
        self._requests = [
            Request(
                prompts[i], min(rollout.max_tokens, self._engine.max_model_len - len(prompts[i])),
                self._rng.getrandbits(31), rollout.temperature, extra, rollout.top_p,
            )
            for i in self._which
        ]  # fmt: skip
        start = time.perf_counter()
        everything = self._engine.run(self._requests, self._finished)
        generating = time.perf_counter() - start
        episodes = self._episodes()
        episodes.generated_tokens = sum(len(response.tokens) for response in everything)
        episodes.generating_s, episodes.busy_s = generating, time.perf_counter() - began
        return episodes

    def _finished(self, number: int, response: Response) -> list[Request]:
        """Grade an answer that is complete; the branches of a response come next."""
        if number < len(self._requests):
            self._responses[number] = response
            self._grades[number] = self._grade(number, response.text)
            if not self._branching:
                return []
            rng = random.Random(f"{self._requests[number].seed}/branches")
            chosen = choose(response, self._config.rollout.branches_per_response, rng)
            roads = [road for decision, weight in chosen for road in self._roads(number, decision, weight, rng)]
            self._branches += roads
            return [
                branch_request(self._requests[number], response, road.decision, road.keep, road.reseed)
                for road in roads
            ]
        branch = self._branches[number - len(self._requests)]
        branch.whole = joined(self._engine, self._responses[branch.response], branch.decision, response)
        if branch.whole is not None:
            branch.grade = self._grade(branch.response, branch.whole.text)
        return []

    def _roads(self, number: int, decision: Any, weight: float, rng: random.Random) -> list[_Branch]:
        """Return the other road at a decision and, where that is asked for, more continuations of both."""
        more = range(self._config.rollout.continuations_per_action - 1)
        return [
            _Branch(number, decision, weight, not decision.kept),
            *(_Branch(number, decision, weight, keep, rng.getrandbits(31)) for keep in (False, True) for _ in more),
        ]

    def _grade(self, number: int, text: str) -> Future[Grade]:
        return self._graders.submit(self._unit.problems[self._which[number]], text)

    def _episodes(self) -> Episodes:
        """Put everything into arrays, in the order of the requests, when the last grade is there."""
        responses = [self._responses[number] for number in range(len(self._requests))]
        grades = [self._grades[number].result() for number in range(len(self._requests))]
        decisions = [(e, decision) for e, response in enumerate(responses) for decision in response.decisions]
        place = {id(decision): m for m, (_, decision) in enumerate(decisions)}
        episodes = Episodes(
            problem=np.array([self._unit.first_problem + i for i in self._which], np.int64),
            reward=np.array([grade.score for grade in grades], np.float64),
            tokens=np.array([len(response.tokens) for response in responses], np.int64),
            steps=np.array([len(response.emitted) for response in responses], np.int64),
            capped=np.array([response.capped for response in responses], bool),
            texts=[response.text for response in responses],
            failures=[grade.failure for grade in grades if grade.failure],
        )
        if decisions:
            episodes.episode = np.array([e for e, _ in decisions], np.int64)
            episodes.statistics = np.stack([d.statistics.numpy() for _, d in decisions])
            episodes.kept = np.array([d.kept for _, d in decisions], bool)
            episodes.probability = np.array([d.probability for _, d in decisions], np.float64)
            episodes.output_position = np.array([d.output_position for _, d in decisions], np.int64)
        whole = [branch for branch in self._branches if branch.grade is not None]
        episodes.continuations = len(whole)
        episodes.discarded = len(self._branches) - len(whole)
        roads: dict[int, list[_Branch]] = {}  # by decision
        for branch in whole:
            roads.setdefault(place[id(branch.decision)], []).append(branch)
        # without one of the other road there is nothing to compare
        roads = {m: own for m, own in sorted(roads.items()) if any(b.keep != b.decision.kept for b in own)}
        if roads:
            self._add_branches(episodes, roads)
        return episodes

    def _add_branches(self, episodes: Episodes, roads: dict[int, list[_Branch]]) -> None:
        table = np.zeros((len(roads), 2, 3))  # [B, drop or keep, reward and saved and capped], means of continuations
        for row, branches in zip(table, roads.values(), strict=True):
            e, decision = branches[0].response, branches[0].decision
            own = episodes.reward[e], saved(episodes.steps[e], episodes.tokens[e]), episodes.capped[e]
            found: tuple[list[Any], list[Any]] = [], []
            found[decision.kept].append(own)
            for branch in branches:
                assert branch.grade is not None
                assert branch.whole is not None
                grade, whole = branch.grade.result(), branch.whole
                found[branch.keep].append((grade.score, saved(len(whole.emitted), len(whole.tokens)), whole.capped))
                if grade.failure:
                    episodes.failures.append(grade.failure)
            row[:] = [np.mean(outcomes, axis=0, dtype=np.float64) for outcomes in found]
        episodes.branch_decision = np.array(list(roads), np.int64)
        episodes.branch_weight = np.array([branches[0].weight for branches in roads.values()], np.float64)
        episodes.branch_drop, episodes.branch_keep = table[:, 0, 0], table[:, 1, 0]
        episodes.branch_drop_saved, episodes.branch_keep_saved = table[:, 0, 1], table[:, 1, 1]
        episodes.branch_drop_capped, episodes.branch_keep_capped = table[:, 0, 2] > 0, table[:, 1, 2] > 0
