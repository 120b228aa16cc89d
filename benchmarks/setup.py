"""What a benchmark asks of whom: a training configuration, and what was given explicitly."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_cospec.arbiter import load_artefact
from vllm_cospec.errors import ConfigError, first_sentence
from vllm_cospec.recipe import locate_artefact
from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import (
    PairConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
    load_train_config,
    locate,
    require_models,
)
from vllm_cospec.training.measure.modes import Mode
from vllm_cospec.training.preflight import test_problems
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.prompts import max_model_len
from vllm_cospec.training.tasks import Problem, task_names

NAME = "model"  # the servers' name for what they serve
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "temperature": 1.0, "top_k": 0,
    "top_p": 1.0, "min_p": 0.0, "max_new_tokens": None,
}  # fmt: skip
"""What a model's ``generation_config.json`` may not change: ``cospec evaluate`` asks without it. Its other keys, such
as the tokens that end a response, stay."""


@dataclass(frozen=True)
class Setup:
    """What is asked of whom."""

    pair: PairConfig
    task: TaskConfig
    problems: list[Problem]
    prompts: list[list[int]]  # token ids of each
    max_tokens: int
    max_model_len: int | None


def set_up(
    config: Path | None, pair_options: dict[str, Any], task_name: str | None, dataset: Path | None, count: int,
    seed: int, max_tokens: int | None,
) -> Setup:  # fmt: skip
    """Combine a configuration with what was given explicitly.

    Args:
        config: training configuration; None for the bundled pair's, or for none when a target is given.
        pair_options: fields of the pair given explicitly; None stands for not given.
        task_name: a task, or a reasoning-gym generator.
        dataset: JSONL of problems instead.
        count, seed: of the problems.
        max_tokens: longest answer.

    Raises:
        ConfigError: something is missing or does not fit.
    """
    here = Path.cwd() / "options"  # paths are relative to the working directory
    given = {name: locate(value, here) for name, value in pair_options.items() if value is not None}
    run = load_train_config(config or DEMO_CONFIG) if config or "target" not in given else None
    try:
        pair = PairConfig.model_validate({**(run.pair.model_dump() if run else {"num_speculative_tokens": 5}), **given})
    except ValidationError as error:
        raise ConfigError(first_sentence(error, "--target, --draft")) from None
    require_models(pair)
    if dataset is not None:
        task = TaskConfig(name="jsonl", options={"path": str(dataset), "test_path": str(dataset)})
    elif task_name is not None and task_name not in task_names():
        task = TaskConfig(name="reasoning_gym", options={"generator": task_name})
    elif task_name is not None or run is None:
        task = TaskConfig(name=task_name or "demo")
    else:
        task = run.task
    longest = max_tokens or (run.rollout.max_tokens if run else 512)
    asked = TrainConfig(pair=pair, task=task, rollout=RolloutConfig(max_tokens=longest))
    source = Problems(pair, task, asked.rollout)
    problems = test_problems(asked, source, seed, count, "test", lambda text: print(text, file=sys.stderr))
    prompts = [source.encode(problem.prompt) for problem in problems]
    return Setup(pair, task, problems, prompts, longest, max_model_len(pair))


def server_arguments(options: dict[str, Any]) -> tuple[str, ...]:
    """Turn arguments of vLLM's ``LLM`` into those of ``vllm serve``."""
    flags: list[str] = ["--served-model-name", NAME]
    neutral = NEUTRAL | options.get("override_generation_config", {})
    for key, value in {**options, "override_generation_config": neutral}.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
    return tuple(flags)


def served(mode: Mode, pair: PairConfig, arbiter: str) -> tuple[str, dict[str, Any] | None]:
    """Return which model a mode serves, and its ``--speculative-config``; None for no speculation.

    Args:
        mode: any.
        pair: the models and K.
        arbiter: directory or hub id for ``learned``.

    Raises:
        ConfigError: there is no such arbiter, or no draft model to serve.
        ArtefactError: the arbiter is damaged.
    """
    if mode.kind == "target":
        return pair.target, None
    if mode.kind == "draft":
        if pair.draft is None:
            raise ConfigError(f"--modes: 'draft': this pair's drafter, {pair.draft_method}, is no model; leave it out")
        return pair.draft, None
    if mode.kind == "standard":
        return pair.target, pair.speculative_config(None)
    if mode.kind == "learned":
        load_artefact(locate_artefact(arbiter))  # a missing or damaged one is refused before servers start
        return pair.target, pair.speculative_config(arbiter) | mode.settings
    return pair.target, pair.speculative_config(mode.policy.model_dump(exclude_none=True)) | mode.settings
