"""Evaluation: any modes answer the same problems on engines of this process's cluster.

Accuracy is the mean score of the task, decided by its reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import PairConfig, RolloutConfig, TaskConfig
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.modes import BASELINES, Mode
from vllm_cospec.training.measure.outcome import Outcome, table_of
from vllm_cospec.training.rollout.actors import EngineActor
from vllm_cospec.training.rollout.engine import Engine, Request, Response
from vllm_cospec.training.rollout.placement import Placed
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.grading import FailureWatch, Grade, Graders

CHUNK = 250


@dataclass(frozen=True)
class Chunk:
    """Some problems in one mode."""

    mode: Mode
    index: int
    problems: tuple[Problem, ...]

    @property
    def key(self) -> tuple[str, int]:
        """Identifies it."""
        return self.mode.name, self.index

    def split(self) -> list[Chunk]:
        """It is not taken apart: an evaluation with holes would be none."""
        return [self]


def chunks_of(mode: Mode, problems: Sequence[Problem]) -> list[Chunk]:
    """Return all problems in one mode, in chunks."""
    return [
        Chunk(mode, i, tuple(problems[first : first + CHUNK])) for i, first in enumerate(range(0, len(problems), CHUNK))
    ]


@dataclass(frozen=True)
class Answers:
    """The outcome of a mode, and what is known of each single answer besides."""

    outcome: Outcome
    texts: Sequence[str]
    steps: np.ndarray  # [n] int64, of the answering model
    mismatches: np.ndarray  # [n] int64
    overrides: np.ndarray  # [n] int64

    @staticmethod
    def merge(parts: Sequence[Answers]) -> Answers:
        """Put parts end to end."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("steps", "mismatches", "overrides")
        }
        return Answers(
            Outcome.merge([part.outcome for part in parts]), [text for part in parts for text in part.texts], **arrays
        )

    def entries(self, mode: str, problems: Sequence[Problem]) -> Iterator[dict[str, Any]]:
        """Yield one JSON object for each answer."""
        for i, problem in enumerate(problems):
            yield {
                "mode": mode, "prompt": problem.prompt, "answer": problem.answer, "text": self.texts[i],
                "score": float(self.outcome.scores[i]), "tokens": int(self.outcome.tokens[i]),
                "steps": int(self.steps[i]), "mismatches": int(self.mismatches[i]),
                "overrides": int(self.overrides[i]),
            }  # fmt: skip


class EvaluationActor(EngineActor):
    """An engine that answers without sampling actions."""

    def __init__(self, pair: PairConfig, task: TaskConfig, kind: str, artefact: str | None, max_tokens: int):
        """Start the engine.

        Args:
            pair, task: what is evaluated, on what.
            kind: one of :func:`engine_of`.
            artefact: the trained arbiter, for ``learned``.
            max_tokens: longest answer.
        """
        arbiter: dict[str, Any] | None = None
        if kind == "rule":
            arbiter = {"policy": "strict"}
        elif kind == "learned":
            arbiter = {"policy": "learned", "artefact": artefact}
        role = "draft" if kind == "draft" else "target"
        super().__init__(pair, task, arbiter, role=role, stock=kind == "standard")
        self._max_tokens = max_tokens

    def work(self, chunk: Chunk, payload: None) -> Answers:
        """Answer a chunk of problems in one mode."""
        self.ready()
        return answer(self._engine, chunk, self._graders, self._max_tokens)


def engine_of(mode: Mode, artefact: bool) -> str:
    """Return which engine answers a mode: target, draft, standard, learned or rule.

    Args:
        mode: any.
        artefact: whether a trained arbiter is at hand; strict requests then go to its engine.
    """
    if mode.policy is None:
        return mode.kind
    return "learned" if mode.kind == "strict" and artefact else "rule"


def prepare(engine: Engine, mode: Mode) -> dict[str, Any]:
    """Have the engine follow a mode's rule, if it has one; returns the ``cospec_*`` keys of the mode's requests."""
    if mode.kind == "strict":
        return {**mode.extra, "cospec_policy": "strict"}
    if mode.policy is not None:
        engine.set_policy(mode.policy)
    return mode.extra


def answer(engine: Engine, chunk: Chunk, graders: Graders, max_tokens: int) -> Answers:
    """Answer a chunk on an engine that fits its mode; random numbers depend on the problem's place."""
    mode = chunk.mode
    extra = prepare(engine, mode)
    engine.start_afresh()
    prompts = [engine.encode(problem.prompt) for problem in chunk.problems]
    first = chunk.index * CHUNK
    requests = [
        Request(
            p, min(max_tokens, engine.max_model_len - len(p)), seed=first + i, temperature=mode.temperature, extra=extra
        )
        for i, p in enumerate(prompts)
    ]
    under_way: dict[int, Future[Grade]] = {}

    def finished(number: int, response: Response) -> tuple[Request, ...]:
        under_way[number] = graders.submit(chunk.problems[number], response.text)
        return ()

    start = time.perf_counter()
    responses = engine.run(requests, finished)
    seconds = time.perf_counter() - start
    grades = [under_way[number].result() for number in range(len(responses))]
    mismatches = np.array([len(r.decisions) for r in responses], np.int64)
    overrides = np.array([sum(d.kept for d in r.decisions) for r in responses], np.int64)
    steps = np.array([len(r.emitted) for r in responses], np.int64)
    tokens = np.array([len(r.tokens) for r in responses], np.int64)
    counts = Counts.of_responses(tokens, steps, int(mismatches.sum()), int(overrides.sum()))
    outcome = Outcome(
        np.arange(first, first + len(responses)),
        np.array([grade.score for grade in grades], np.float64),
        tokens,
        np.array([r.capped for r in responses], bool),
        counts,
        seconds,
        failures=[grade.failure for grade in grades if grade.failure],
    )
    return Answers(outcome, [r.text for r in responses], steps, mismatches, overrides)


def evaluate(
    pair: PairConfig,
    task: TaskConfig,
    rollout: RolloutConfig,
    modes: Sequence[Mode],
    problems: Sequence[Problem],
    artefact: Path | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> dict[str, Answers]:
    """Answer all problems in every mode. Needs a Ray session.

    Args:
        pair, task: what is evaluated, on what.
        rollout: how many engines, with which resources, and the longest response.
        modes: from :func:`vllm_cospec.training.measure.modes.parse_mode`.
        problems: the same for all modes.
        artefact: the trained arbiter, for ``learned``.
        tick: called with the number of answers that have arrived.

    Returns:
        Answers by mode's name, in the order of ``problems``.

    Raises:
        RewardError: more answers than is allowed could not be graded.
    """
    actor = Placed(EvaluationActor, pair, rollout)
    where = None if artefact is None else str(artefact)
    watch = FailureWatch(task.max_failed_rewards)
    answers: dict[str, Answers] = {}
    for kind in dict.fromkeys(engine_of(mode, artefact is not None) for mode in modes):
        wanted = [mode for mode in modes if engine_of(mode, artefact is not None) == kind]
        chunks = [chunk for mode in wanted for chunk in chunks_of(mode, problems)]

        def make_actor(kind: str = kind) -> Any:
            return actor.remote(pair, task, kind, where, rollout.max_tokens)

        def arrived(parts: list[Answers]) -> None:
            for part in parts:
                watch.add(len(part.texts), part.outcome.failures)
                tick(len(part.texts))

        with Pool(make_actor, min(rollout.actors, len(chunks)), depth=1) as pool:
            pool.submit(chunks)
            results = pool.collect([chunk.key for chunk in chunks], tick=arrived)
            if pool.set_aside:
                raise ConfigError(f"engine {kind}: its actors were lost again and again; the last one {pool.last_loss}")
        for mode in wanted:
            own = [parts[0] for chunk, parts in zip(chunks, results, strict=True) if chunk.mode is mode]
            answers[mode.name] = Answers.merge(own)
    return {mode.name: answers[mode.name] for mode in modes}


def rows_of(answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """Return a row of figures for each mode, paired with the target's.

    That is the baseline of :func:`vllm_cospec.training.measure.modes.at_temperature` where there is one, else
    ``target``, else ``strict``, which emits the target's tokens.
    """
    candidates = [*(f"target, {baseline}" for baseline in BASELINES), "target", "strict"]
    return table_of(
        {mode: own.outcome for mode, own in answers.items()},
        next((name for name in candidates if name in answers), None),
    )
