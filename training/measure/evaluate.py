"""Evaluation: any modes on the same problems, paired, with intervals.

A mode is written as ``target``, ``draft`` (each model alone), ``strict``, ``learned``, ``learned(threshold=0.6)``, or a
rule with its parameters: ``cascade(alpha=0.95)``. Accuracy is the mean score of the task, decided by its reward.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from vllm_cospec.errors import ConfigError, first_sentence, shorten
from vllm_cospec.kernels.policies import AnyPolicy, policy_names
from vllm_cospec.training.config import PairConfig, RolloutConfig, TaskConfig
from vllm_cospec.training.measure.intervals import bootstrap_difference, mcnemar, paired_difference, wilson_interval
from vllm_cospec.training.rollout.engine import Blocks, Engine, Request
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.rewards import Reward, guarded

CHUNK = 250
BASELINES = ("greedy", "sampled")
_MODE = re.compile(r"(\w+)(?:\((.*)\))?")


@dataclass(frozen=True)
class Mode:
    """One way of answering."""

    name: str
    engine: str  # which engine it needs: target, draft, learned, or rule
    policy: Any = None  # of a rule
    extra: dict[str, Any] = field(default_factory=dict)  # cospec_* keys of its requests
    temperature: float = 0.0  # 0 is greedy


def sampled_modes(modes: Sequence[Mode], temperature: float, baseline: str) -> list[Mode]:
    """Return the modes at a temperature, and before them the target they are compared with.

    "Better than the target" can mean no more than that sampling and greedy decoding differ; so a comparison at a
    temperature names its baseline.

    Args:
        modes: from :func:`parse_mode`.
        temperature: 0 leaves the modes as they are.
        baseline: ``sampled`` for the target at the same temperature, ``greedy`` for the target's greedy answers.

    Raises:
        ConfigError: there is nothing sampled to compare with.
    """
    if baseline not in BASELINES:
        raise ConfigError(f"--baseline: {baseline!r} is neither {' nor '.join(BASELINES)}")
    if temperature == 0:
        if baseline == "sampled":
            raise ConfigError("--baseline: 'sampled' needs a --temperature above 0")
        return list(modes)
    first = Mode(f"target, {baseline}", "target", temperature=temperature if baseline == "sampled" else 0.0)
    others = [mode for mode in modes if (mode.engine, baseline) != ("target", "sampled")]
    return [first, *(replace(mode, temperature=temperature) for mode in others)]


def parse_mode(text: str, artefact: bool) -> Mode:
    """Read a mode.

    Args:
        text: as a user writes it.
        artefact: whether a trained arbiter is at hand; strict requests then go to its engine.

    Raises:
        ConfigError: says what is wrong with it.
    """
    match = _MODE.fullmatch(text.strip())
    name = match.group(1) if match else text
    parameters: dict[str, Any] = {}
    try:
        for part in (match.group(2) or "").split(",") if match else ():
            if part.strip():
                key, _, value = part.partition("=")
                parameters[key.strip()] = json.loads(value)
    except ValueError:
        raise ConfigError(f"--mode: {text!r} is not of the form NAME(parameter=number, ...)") from None
    if name in ("target", "draft") and not parameters:
        return Mode(text, name)
    if name == "strict" and artefact and not parameters:
        return Mode(text, "learned", extra={"cospec_policy": "strict"})
    if name == "learned":
        if not artefact:
            raise ConfigError(f"--mode: {text!r} needs a trained arbiter; pass its directory")
        if set(parameters) - {"threshold"}:
            raise ConfigError(f"--mode: {text!r}: the only parameter of learned is threshold")
        for value in parameters.values():
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ConfigError(f"--mode: {text!r}: threshold must be a number from 0 to 1, got {shorten(value)}")
        return Mode(text, "learned", extra={f"cospec_{key}": float(value) for key, value in parameters.items()})
    if name not in policy_names():
        known = ", ".join(["target", "draft", *policy_names()])
        raise ConfigError(f"--mode: unknown mode {text!r}; known are {known}")
    return Mode(text, "rule", _rule(text, {"policy": name, **parameters}))


def _rule(text: str, raw: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(AnyPolicy).validate_python(raw)
    except ValidationError as error:
        raise ConfigError(first_sentence(error, f"--mode {text}", hide=policy_names())) from None


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


@dataclass
class Answers:
    """What a mode made of some problems."""

    scores: np.ndarray  # [n] float64
    tokens: np.ndarray  # [n] int64
    steps: np.ndarray  # [n] int64, of the answering model
    capped: np.ndarray  # [n] bool
    mismatches: np.ndarray  # [n] int64, those the policy was asked about
    overrides: np.ndarray  # [n] int64
    texts: list[str]
    blocks: Blocks
    seconds: float

    @staticmethod
    def merge(parts: Sequence[Answers]) -> Answers:
        """Put parts end to end."""
        names = "scores", "tokens", "steps", "capped", "mismatches", "overrides"
        arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Answers(
            **arrays,
            texts=[text for part in parts for text in part.texts],
            blocks=sum((part.blocks for part in parts), Blocks()),
            seconds=sum(part.seconds for part in parts),
        )

    def summary(self, target: Answers | None = None) -> dict[str, Any]:
        """Return the figures for a table and for JSON; paired with the target's answers where those are given."""
        n = len(self.scores)
        mismatches, overrides = int(self.mismatches.sum()), int(self.overrides.sum())
        row: dict[str, Any] = {
            "num_problems": n,
            "accuracy": float(self.scores.mean()),
            "accuracy_ci95": list(wilson_interval(float(self.scores.sum()), n)),
            "acceptance_length": self.blocks.acceptance_length,
            "num_mismatches": mismatches,
            "num_overrides": overrides,
            "override_rate": overrides / max(1, mismatches),
            "mean_output_tokens": float(self.tokens.mean()),
            "length_cap_hits": int(self.capped.sum()),
        }
        if target is not None:
            difference, interval = paired_difference(self.scores, target.scores)
            gained, lost = int((self.scores > target.scores).sum()), int((self.scores < target.scores).sum())
            row["paired_vs_target"] = {
                "difference": difference, "ci95": list(interval), "gained": gained, "lost": lost,
                "bootstrap_ci95": list(bootstrap_difference(self.scores, target.scores)),
                "p_value": mcnemar(gained, lost),
            }  # fmt: skip
        return row


def answer(engine: Engine, chunk: Chunk, reward: Reward, reward_timeout_s: float, max_tokens: int) -> Answers:
    """Answer a chunk on an engine that fits its mode; random numbers depend on the problem's place."""
    if chunk.mode.policy is not None:
        engine.set_policy(chunk.mode.policy)
    engine.start_afresh()
    prompts = [engine.encode(problem.prompt) for problem in chunk.problems]
    requests = [
        Request(
            p,
            min(max_tokens, engine.max_model_len - len(p)),
            seed=chunk.index * CHUNK + i,
            temperature=chunk.mode.temperature,
            extra=chunk.mode.extra,
        )
        for i, p in enumerate(prompts)
    ]
    before, start = engine.blocks(), time.perf_counter()
    responses = engine.run(requests)
    seconds, after = time.perf_counter() - start, engine.blocks()
    scores = [guarded(reward, p, r.text, reward_timeout_s) for p, r in zip(chunk.problems, responses, strict=True)]
    return Answers(
        np.array(scores, np.float64),
        np.array([len(r.tokens) for r in responses], np.int64),
        np.array([len(r.emitted) for r in responses], np.int64),
        np.array([r.capped for r in responses], bool),
        np.array([len(r.decisions) for r in responses], np.int64),
        np.array([sum(d.kept for d in r.decisions) for r in responses], np.int64),
        [r.text for r in responses],
        Blocks(after.drafts - before.drafts, after.accepted - before.accepted),
        seconds,
    )


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
        modes: from :func:`parse_mode`.
        problems: the same for all modes.
        artefact: the trained arbiter, for ``learned``.
        tick: called with the number of answers that have arrived.

    Returns:
        Answers by mode's name, in the order of ``problems``.
    """
    from vllm_cospec.training.rollout.actors import EvaluationActor, remote
    from vllm_cospec.training.rollout.pool import Pool

    actor = remote(EvaluationActor, rollout.cpus_per_actor, rollout.gpus_per_actor)
    answers: dict[str, Answers] = {}
    for engine in dict.fromkeys(mode.engine for mode in modes):
        arbiter: dict[str, Any] | None = None
        if engine == "rule":
            arbiter = {"policy": "strict"}
        elif engine == "learned":
            arbiter = {"policy": "learned", "artefact": str(artefact)}
        wanted = [mode for mode in modes if mode.engine == engine]
        chunks = [
            Chunk(mode, i, tuple(problems[first : first + CHUNK]))
            for mode in wanted
            for i, first in enumerate(range(0, len(problems), CHUNK))
        ]
        role = "draft" if engine == "draft" else "target"

        def make_actor(arbiter: Any = arbiter, role: str = role) -> Any:
            return actor.remote(pair, task, arbiter, role, rollout.max_tokens)

        with Pool(make_actor, min(rollout.actors, len(chunks)), depth=1) as pool:
            pool.submit(chunks)
            results = pool.collect(
                [chunk.key for chunk in chunks], tick=lambda parts: tick(sum(len(p.scores) for p in parts))
            )
            if pool.set_aside:
                raise ConfigError(f"engine {engine}: lost its process again and again; see Ray's logs")
        for mode in wanted:
            own = [parts[0] for chunk, parts in zip(chunks, results, strict=True) if chunk.mode is mode]
            answers[mode.name] = Answers.merge(own)
    return {mode.name: answers[mode.name] for mode in modes}


def summaries(answers: dict[str, Answers]) -> dict[str, dict[str, Any]]:
    """Return the summary of every mode, paired with the target's.

    That is the baseline of :func:`sampled_modes` where there is one, else ``target``, else ``strict``, which emits the
    target's tokens.
    """
    baselines = [f"target, {baseline}" for baseline in BASELINES]
    target = next((answers[name] for name in (*baselines, "target", "strict") if name in answers), None)
    return {name: own.summary(None if own is target else target) for name, own in answers.items()}


def comparison_table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """Return summaries by mode as a table."""
    table = Table(title=title)
    headings = "mode", "accuracy (95 %)", "vs target", "p", "acceptance length", "override rate", "tokens", "capped"
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for name, row in rows.items():
        low, high = row["accuracy_ci95"]
        paired = row.get("paired_vs_target")
        table.add_row(
            name,
            f"{100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * paired['difference']:+.1f}" if paired else "",
            f"{paired['p_value']:.1g}" if paired else "",
            f"{row['acceptance_length']:.2f}",
            f"{row['override_rate']:.2f}",
            f"{row['mean_output_tokens']:.1f}",
            str(row["length_cap_hits"]),
        )
    return table
