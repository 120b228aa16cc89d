"""What a task is, and how one is found by name.

A task yields :class:`Problem` objects and scores response texts. ``load_task(name)`` finds one that was registered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pydantic import ValidationError

from vllm_cospec.errors import ConfigError, first_sentence
from vllm_cospec.kernels.frozen import Frozen
from vllm_cospec.training.tasks.splits import Split


@dataclass(frozen=True)
class Problem:
    """One question and the answer that counts as correct."""

    prompt: str
    answer: str
    metadata: Any = field(default=None, compare=False, repr=False)  # what the task's own scorer needs besides
    source: str = field(default="", compare=False, repr=False)  # where it stands: a file and a line


class Task(Protocol):
    """A source of problems and the judge of responses to them."""

    def problems(self, seed: int, n: int, split: Split = "test") -> list[Problem]:
        """Return ``n`` distinct problems of ``split``, the same ones for the same ``seed``."""

    def score(self, problem: Problem, text: str) -> float:
        """Return the score of a response ``text``: 1.0 right, 0.0 wrong."""


def digest(problems: Sequence[Problem]) -> str:
    """Return a SHA-256 of prompts and answers, by which a result says what it was measured on."""
    entries = "".join(json.dumps([problem.prompt, problem.answer]) + "\n" for problem in problems)
    return hashlib.sha256(entries.encode()).hexdigest()


@runtime_checkable
class FurtherFigures(Protocol):
    """A task with more to say about a mode's answers than their mean score."""

    def figures(self, problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, float]:
        """Return figures by name for one response text per problem."""


class Options(Frozen):
    """What a task can be told; a task without options has none."""


_TASKS: dict[str, tuple[type[Options], Callable[[Any], Task]]] = {}


def task(name: str, options: type[Options] = Options) -> Callable[[Callable[[Any], Task]], Callable[[Any], Task]]:
    """Register a task factory, called with its options, under ``name``."""

    def register(factory: Callable[[Any], Task]) -> Callable[[Any], Task]:
        _TASKS[name] = options, factory
        return factory

    return register


def task_names() -> list[str]:
    """Return the names of all tasks, sorted."""
    return sorted(_TASKS)


def load_task(name: str, **options: Any) -> Task:
    """Return the task registered under ``name``, with its options.

    Raises:
        ConfigError: no such task, or an option it does not take; the message lists the known ones.
    """
    if name not in task_names():
        raise ConfigError(f"task: unknown task {name!r}; known tasks: {', '.join(task_names())}")
    kind, factory = _TASKS[name]
    try:
        return factory(kind.model_validate(options))
    except ValidationError as error:
        raise ConfigError(first_sentence(error, "task.options")) from None
