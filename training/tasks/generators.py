"""The task made of a reasoning-gym generator."""

from __future__ import annotations

import random
import sys
from types import ModuleType
from typing import Any

from pydantic import Field

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks.protocol import Options, Problem, task
from vllm_cospec.training.tasks.splits import GIVEN, Split, split_of


class ReasoningGymOptions(Options):
    """Of the task reasoning_gym."""

    generator: str
    """Name of a generator, for example chain_sum."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Its own settings; not seed and size."""


@task("reasoning_gym", ReasoningGymOptions)
class ReasoningGymTask:
    """Problems of one reasoning-gym generator, scored by its own scorer.

    Raises:
        ConfigError: reasoning-gym is missing, or refuses the generator or its settings.
    """

    def __init__(self, options: ReasoningGymOptions):
        try:
            import pycosat  # noqa: F401
        except ImportError:  # it comes without a wheel, and of all generators the zebra puzzles alone call it
            sys.modules["pycosat"] = ModuleType("pycosat")
        try:
            import reasoning_gym
        except ImportError as error:
            raise ConfigError(f"task.name: 'reasoning_gym' needs the package reasoning-gym ({error})") from None
        self._module, self._options = reasoning_gym, options
        self._scorer = self._dataset(seed=0, size=1)

    def _dataset(self, seed: int, size: int) -> Any:
        try:
            return self._module.create_dataset(self._options.generator, seed=seed, size=size, **self._options.config)
        except Exception as error:  # it raises many unrelated types for bad names and settings
            raise ConfigError(
                f"task.options.generator: {self._options.generator!r} with {self._options.config} is refused "
                f"({type(error).__name__}: {error})"
            ) from None

    def problems(self, seed: int, n: int, split: Split = "test") -> list[Problem]:
        """See :meth:`Task.problems`. A hash of the prompt decides which split a generated problem is in.

        Raises:
            ConfigError: the generator yields too few distinct problems.
        """
        found: dict[str, Problem] = {}
        size = 64 * n + 1000
        for entry in self._dataset(random.Random(f"{split}/{seed}").getrandbits(31), size):
            prompt = entry["question"]
            if prompt not in found and split_of(prompt) in GIVEN[split]:
                found[prompt] = Problem(prompt, str(entry["answer"]), entry["metadata"])
                if len(found) == n:
                    return list(found.values())
        raise ConfigError(
            f"task.options.generator: {self._options.generator!r} yields {len(found)} distinct problems for {split} "
            f"among {size}, {n} were asked for"
        )

    def score(self, problem: Problem, text: str) -> float:
        """By the generator's scorer."""
        entry = {"question": problem.prompt, "answer": problem.answer, "metadata": problem.metadata or {}}
        return float(self._scorer.score_answer(text.strip(), entry))
