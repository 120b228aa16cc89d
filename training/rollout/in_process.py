"""What a pool offers, by one engine of this process: no actors, no Ray, one unit after another.

For a single accelerator on which several runs share an engine: starting one takes longer than some runs train for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.rollout.collect import roll_out
from vllm_cospec.training.rollout.engine import Engine
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.units import Unit
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


def roll_out_with(engine: Engine, graders: Graders, config: TrainConfig) -> InProcess:
    """Return what a run of this configuration can be trained with."""

    def work(unit: Unit, weights: dict[str, Any]) -> Episodes:
        engine.set_arbiter(weights, sample_actions=unit.threshold is None)
        return roll_out(engine, unit, config, graders)

    return InProcess(work)
