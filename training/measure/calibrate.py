"""Calibration: what each threshold does on held-out problems, how much it loses at most, and which one is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_cospec.arbiter import load_artefact, save_artefact
from vllm_cospec.calibration import Conditions, CurvePoint, Statement
from vllm_cospec.drift import Finished, histogram
from vllm_cospec.errors import ConfigError
from vllm_cospec.fingerprint import template_hash, weights_hash
from vllm_cospec.training.config import PairConfig, RolloutConfig, TaskConfig, TrainConfig
from vllm_cospec.training.measure.card import model_card
from vllm_cospec.training.measure.fixed_sequence import best_passed, sequence_bounds, threshold_sequence
from vllm_cospec.training.measure.noninferiority import binary
from vllm_cospec.training.measure.outcome import table_of
from vllm_cospec.training.measure.thresholds import Sweep, sweep
from vllm_cospec.training.measure.traffic import traffic_of
from vllm_cospec.training.prompts import target_tokenizer
from vllm_cospec.training.rollout.actors import EngineActor
from vllm_cospec.training.rollout.engine import Engine, Request
from vllm_cospec.training.rollout.placement import Placed
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.tasks import Problem, digest
from vllm_cospec.training.tasks.grading import FailureWatch, Graders

CHUNK = 250


@dataclass(frozen=True)
class Part:
    """Some problems, to be answered at every threshold."""

    index: int
    problems: tuple[Problem, ...]
    thresholds: tuple[float, ...]
    temperature: float
    top_p: float

    @property
    def key(self) -> int:
        """Identifies it."""
        return self.index

    def split(self) -> list[Part]:
        """It is not taken apart: a curve with holes would be none."""
        return [self]


@dataclass(frozen=True)
class Answered:
    """The answers to a part."""

    sweep: Sweep
    dtype: str  # of the target
    failures: tuple[str, ...]  # of the grader, a sentence each


class SweepActor(EngineActor):
    """An engine that answers problems at every threshold of its arbiter."""

    def __init__(self, pair: PairConfig, task: TaskConfig, rollout: RolloutConfig, artefact: str):
        super().__init__(pair, task, {"policy": "learned", "artefact": artefact})
        self._max_tokens = rollout.max_tokens

    def work(self, part: Part, payload: None) -> Answered:
        """Answer some problems."""
        self.ready()
        return answer_part(self._engine, self._graders, part, self._max_tokens)


def answer_part(engine: Engine, graders: Graders, part: Part, max_tokens: int) -> Answered:
    """Answer some problems at every threshold, with the arbiter that the engine has."""
    engine.start_afresh()
    prompts = [engine.encode(problem.prompt) for problem in part.problems]
    requests = [
        Request(
            prompt, min(max_tokens, engine.max_model_len - len(prompt)),
            seed=part.index * CHUNK + i, temperature=part.temperature, top_p=part.top_p,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    failures: list[str] = []

    def score(i: int, text: str) -> float:
        grade = graders.submit(part.problems[i], text).result()
        failures.extend([grade.failure] * bool(grade.failure))
        return grade.score

    return Answered(sweep(engine.run, requests, part.thresholds, score), engine.dtype, tuple(failures))


def chosen(found: Sweep, config: TrainConfig) -> tuple[np.ndarray, int]:
    """Return the bound of each threshold's loss, float64 [T], and the index of the threshold to serve.

    Raises:
        ValueError: scores are not from 0 to 1.
    """
    calibration = config.calibration
    bounds = np.concatenate([[0.0], sequence_bounds(found.scores[1:], found.scores[0], calibration.level)])
    saved = [found.steps_saved(i) for i in range(len(found.thresholds))]
    margin, speed = calibration.max_accuracy_loss, config.learner.speed_weight
    return bounds, best_passed(bounds, found.scores, saved, margin, speed)


def calibrate(
    directory: Path,
    config: TrainConfig,
    problems: Sequence[Problem],
    tick: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Measure the thresholds, choose one, and write curve, bounds and choice into the artefact. Needs a Ray session.

    The chosen threshold is the one with the most accuracy, where a gain in speed counts as much as in training, among
    those whose loss is bounded by ``calibration.max_accuracy_loss``; strict is one of them, and all there is where
    nothing else passes. What is not significantly less, and faster, is preferred: see
    :func:`vllm_cospec.training.measure.fixed_sequence.best_passed`.

    Args:
        directory: the artefact.
        config: of the run.
        problems: of the calibration split.
        tick: called with the number of problems that have been answered at every threshold.

    Returns:
        The row of each threshold, the first of which is strict verification; it holds ``threshold``, ``loss_bound``
        and, where it is the chosen one, ``chosen``.

    Raises:
        ConfigError: the reward is not one from 0 to 1.
        RewardError: more answers than is allowed could not be graded.
    """
    task, calibration = config.task, config.calibration
    found, dtype = _answers(directory, config, problems, tick)
    try:
        bounds, best = chosen(found, config)
    except ValueError as error:
        raise ConfigError(f"task.reward: {error}; use a reward from 0 to 1") from None
    rows = table_of({_name(t): found.outcome(i) for i, t in enumerate(found.thresholds)}, _name(found.thresholds[0]))
    for row, threshold, bound in zip(rows, found.thresholds, bounds, strict=True):
        row.update(threshold=threshold, loss_bound=float(bound))
    rows[best]["chosen"] = True
    statement = Statement(
        level=calibration.level,
        test="exact" if binary(found.scores) else "betting",
        max_accuracy_loss=calibration.max_accuracy_loss,
        speed_weight=config.learner.speed_weight,
        task=task.name,
        task_hash=digest(problems),
        conditions=_conditions(config, dtype),
        traffic=traffic_of(_requests(found, best)) if best else None,
    )
    arbiter, artefact = load_artefact(directory)
    artefact = artefact.model_copy(
        update={
            "format_version": 2,
            "threshold": found.thresholds[best],
            "calibration": tuple(_point(row) for row in rows),
            "statement": statement,
        }
    )
    save_artefact(directory, arbiter, artefact, model_card(artefact))
    return rows


def conclusion(rows: Sequence[dict[str, Any]], margin: float, level: float) -> str:
    """Return a sentence about what was chosen, and why."""
    chosen = next(row for row in rows if row.get("chosen"))
    n, strict = chosen["num_problems"], rows[0]
    if chosen is not strict:
        bound, difference = max(chosen["loss_bound"], 1e-4), chosen["accuracy"] - strict["accuracy"]
        return (
            f"threshold {chosen['threshold']:g}: with {level:.0%} confidence it loses less than {bound:.4f} "
            f"of accuracy ({difference:+.4f} on these {n} problems)"
        )
    others = [row for row in rows if row is not strict]
    if any(row["loss_bound"] <= margin for row in others):
        return f"strict: no threshold that passes does better than strict verification on these {n} problems"
    return (
        f"strict: no threshold keeps the loss below {margin:g} with {level:.0%} confidence on {n} problems; the "
        f"smallest bound is {others[0]['loss_bound']:.4f}. Calibrate with more problems, accept a larger "
        f"calibration.max_accuracy_loss, or train further"
    )


def _answers(
    directory: Path, config: TrainConfig, problems: Sequence[Problem], tick: Callable[[int], None]
) -> tuple[Sweep, str]:
    rollout = config.rollout
    thresholds = threshold_sequence(config.calibration.thresholds)
    size = max(1, min(CHUNK, -(-len(problems) // rollout.actors)))
    parts = [
        Part(i, tuple(problems[first : first + size]), thresholds, config.served_temperature, rollout.top_p)
        for i, first in enumerate(range(0, len(problems), size))
    ]
    actor = Placed(SweepActor, config.pair, rollout)

    def make_actor() -> Any:
        return actor.remote(config.pair, config.task, rollout, str(directory))

    watch = FailureWatch(config.task.max_failed_rewards)

    def arrived(done: list[Answered]) -> None:
        for one in done:
            watch.add(len(one.sweep.score), one.failures)
            tick(one.sweep.response.shape[1])

    with Pool(make_actor, min(rollout.actors, len(parts)), depth=1) as pool:
        pool.submit(parts)
        results = pool.collect([part.key for part in parts], tick=arrived)
        if pool.set_aside:
            raise ConfigError("an engine lost its process again and again; see Ray's logs")
    answers: list[Answered] = [one for done in results for one in done]
    return Sweep.merge([one.sweep for one in answers]), answers[0].dtype


def _name(threshold: float) -> str:
    return "strict" if threshold == 1 else f"learned(threshold={threshold:g})"


def _point(row: dict[str, Any]) -> CurvePoint:
    paired = row["paired_vs_target"] or {"difference": 0.0, "ci95": (0.0, 0.0)}
    return CurvePoint(
        threshold=row["threshold"],
        accuracy=row["accuracy"],
        accuracy_difference=paired["difference"],
        accuracy_difference_ci95=tuple(paired["ci95"]),
        loss_bound=row["loss_bound"],
        acceptance_length=row["acceptance_length"],
        override_rate=row["override_rate"],
        num_problems=row["num_problems"],
    )


def _conditions(config: TrainConfig, dtype: str) -> Conditions:
    return Conditions(
        draft=weights_hash(config.pair.draft),
        num_speculative_tokens=config.pair.num_speculative_tokens,
        dtype=dtype,
        chat_template=template_hash(getattr(target_tokenizer(config.pair), "chat_template", None)),
        temperature=(config.served_temperature,) * 2,
        top_p=(config.rollout.top_p,) * 2,
    )


def _requests(found: Sweep, index: int) -> list[Finished]:
    """What is counted of each problem's request at a threshold."""
    threshold = np.float32(found.thresholds[index])
    return [
        Finished(
            int(found.tokens[number]),
            len(found.decisions[number]),
            int((found.decisions[number] > threshold).sum()),
            histogram(found.decisions[number]),
        )
        for number in found.response[index]
    ]
