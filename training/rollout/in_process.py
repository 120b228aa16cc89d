"""What a pool offers, by one engine of this process: no actors, no Ray, one unit after another.

For a single accelerator on which several runs share an engine: starting one takes longer than some runs train for.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any

from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.rollout.collect import roll_out_with
from vllm_cospec.training.rollout.engine import Engine
from vllm_cospec.training.tasks.grading import Graders


class InProcess:
    """Does units when their results are asked for, in that order.

    What raises in a unit is raised to the caller: there is no other actor that could try again.
    """

    def __init__(self, work: Callable[[Any, Any], Any]):
        """Args:
        work: does a unit with what was submitted along with it.
        """
        self._work = work
        self._waiting: dict[Hashable, tuple[Any, Any]] = {}
        self.set_aside: list[Any] = []  # always empty

    def put(self, payload: Any) -> Any:
        """Return what units are to be submitted with, for a payload that many of them share."""
        return payload

    def submit(self, work: Iterable[Any], payload: Any = None) -> None:
        """Queue units; ``payload`` goes along with each."""
        self._waiting |= {unit.key: (unit, payload) for unit in work}

    def collect(self, keys: Iterable[Hashable], tick: Callable[[Any], None] = lambda result: None) -> list[Any]:
        """Return the results of units in the order of ``keys``, a list of one for each, as a pool does."""
        found = []
        for key in keys:
            unit, payload = self._waiting.pop(key)
            found.append([self._work(unit, copy.deepcopy(payload))])
            tick(found[-1])
        return found


@contextlib.contextmanager
def training_engine(config: TrainConfig, weights: dict[str, Any]) -> Iterator[tuple[Engine, Graders]]:
    """Have an engine in this process with an arbiter in training, of these weights to begin with, and its graders."""
    with Graders(config.task) as graders:
        engine = Engine(config.pair, config.learner.in_training(weights), task=config.task)
        graders.wait_until_ready()
        yield engine, graders


def rollouts(engine: Engine, graders: Graders, config: TrainConfig) -> InProcess:
    """Return what a run of this configuration can be trained with."""
    return InProcess(partial(roll_out_with, engine, graders, config))
