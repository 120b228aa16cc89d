"""What an engine of the bundled pair answers in some modes: its own module, for a fork to find it by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.measure.evaluate import Chunk, EvaluationActor
from vllm_cospec.training.measure.modes import Mode
from vllm_cospec.training.rollout.placement import ACTOR_ENVIRONMENT
from vllm_cospec.training.tasks import load_task


def answers(job: tuple[str, Path, list[Mode]]) -> dict[str, Any]:
    """What an engine of this process answers in modes that it fits."""
    kind, arbiter, modes = job
    os.environ |= ACTOR_ENVIRONMENT
    config = load_train_config(DEMO_CONFIG)
    problems = tuple(load_task("demo").problems(seed=9, n=60, split="test"))
    actor = EvaluationActor(config.pair, config.task, kind, str(arbiter), config.rollout.max_tokens)
    return {mode.name: actor.work(Chunk(mode, 0, problems), None) for mode in modes}
