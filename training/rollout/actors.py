"""The Ray actors: thin shells around an engine."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from vllm_cospec.errors import ConfigError, CoSpecError, one_line
from vllm_cospec.training.config import PairConfig, TaskConfig, TrainConfig, require_models
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.units import Unit

if TYPE_CHECKING:
    from vllm_cospec.training.tasks.grading import Graders


class EngineActor:
    """An engine and graders in a process of their own; what keeps them from starting is raised by the first call."""

    def __init__(self, pair: PairConfig, task: TaskConfig, arbiter: dict[str, Any] | None, **options: Any):
        """Start them.

        Args:
            pair, task: what is answered, by which models.
            arbiter, options: of :class:`vllm_cospec.training.rollout.engine.Engine`.
        """
        from vllm_cospec.training.rollout.engine import Engine
        from vllm_cospec.training.tasks.grading import Graders

        self._failure: Exception | None = None
        try:
            require_models_here(pair)
            self._graders = Graders(task)
            self._engine = Engine(pair, arbiter, task=task, **options)
            require_task_here(self._graders)
        except Exception as error:
            self._failure = error

    def ready(self) -> bool:
        """Resolve once the engine is there; raises what kept it from starting."""
        raise_plainly(self._failure)
        return True


class RolloutActor(EngineActor):
    """An engine that collects, for training."""

    def __init__(self, config: TrainConfig, weights: dict[str, Any]):
        super().__init__(config.pair, config.task, config.learner.in_training(weights))
        self._config = config

    def work(self, unit: Unit, weights: dict[str, Any]) -> Episodes:
        """Roll out a unit with these weights."""
        from vllm_cospec.training.rollout.collect import roll_out_with

        self.ready()
        return roll_out_with(self._engine, self._graders, self._config, unit, weights)


def require_models_here(pair: PairConfig) -> None:
    """Refuse a node that lacks a model which the driver's has.

    Raises:
        ConfigError: names the node, the directory and the way out.
    """
    try:
        require_models(pair)
    except ConfigError as error:
        raise ConfigError(
            f"{str(error).partition(';')[0]} on the node {socket.gethostname()}; put models at the same path on every "
            f"node or on a file system they share, or name them by hub id"
        ) from None


def require_task_here(graders: Graders) -> None:
    """Wait for the grading processes; refuse a node that lacks a module or a file of the task, which the driver's has.

    Raises:
        ConfigError: names the setting, the node and the way out.
    """
    try:
        graders.wait_until_ready()
    except ConfigError as error:
        raise ConfigError(
            f"{str(error).partition(';')[0]} on the node {socket.gethostname()}; put modules and files that the task "
            f"names at the same path on every node, or on a file system they share"
        ) from None


def raise_plainly(failure: Exception | None) -> None:
    """Raise what went wrong in a constructor as an error of the driver's own kind.

    Ray reports an exception of a constructor like a death, and the pool would try again: but an engine that cannot be
    built once cannot be built the second time. The vLLM types may not survive pickling, a sentence does.
    """
    if isinstance(failure, CoSpecError):
        raise failure
    if failure is not None:
        reason = one_line(failure) or "no reason given"
        raise ConfigError(f"the engine cannot be started: {type(failure).__name__}: {reason}")
