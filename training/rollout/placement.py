"""Where an engine runs: on what its actor asks for, or in a placement group of the actor's own.

An actor runs on one node, gets all it asks for or waits, and gives it back when it ends. So where the ranks of an
engine are child processes of its actor, as vLLM starts them by itself, the actor asks for the GPUs of all of them. A
group would add nothing, and do harm: vLLM starts the ranks of an engine that finds itself in a group as Ray actors.

Where they are to be Ray actors (``pair.engine.distributed_executor_backend = "ray"``), the GPUs have to be theirs: an
actor that held them would wait for as many again. Then each actor has a group, with a bundle for each GPU, all of
them on one node. The ranks find it by themselves. It is granted as a whole, and removed with the actor.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vllm_cospec.training.config import PairConfig, RolloutConfig

ACTOR_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Grouped:
    """An actor with its group; to be used like the actor's handle."""

    def __init__(self, actor: Any, group: PlacementGroup):
        self.actor, self.group = actor, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self.actor, name)


class Placed:
    """Makes actors of one kind, each with room for an engine."""

    def __init__(self, actor: type, pair: PairConfig, rollout: RolloutConfig):
        """Describe them; nothing is asked for yet.

        Args:
            actor: class of an actor that starts an engine.
            pair: whether the engine's ranks are Ray actors.
            rollout: CPUs and GPUs of each.
        """
        cpus, gpus = rollout.cpus_per_actor, rollout.gpus_per_actor
        environment = {**ACTOR_ENVIRONMENT, "OMP_NUM_THREADS": str(max(1, int(cpus)))}
        self._bundles = [{"GPU": 1.0} for _ in range(int(gpus))] if pair.ranks_are_ray_actors else []
        if self._bundles and cpus:
            self._bundles[0]["CPU"] = cpus
        self._actor: Any = ray.remote(actor)
        self._options: dict[str, Any] = {
            "num_cpus": cpus, "num_gpus": 0 if self._bundles else gpus, "max_restarts": 0,
            "runtime_env": {"env_vars": environment},
        }  # fmt: skip

    def remote(self, *arguments: Any) -> Any:
        """Ask for an actor; returns at once, whether there is room for it or not."""
        if not self._bundles:
            return self._actor.options(**self._options).remote(*arguments)
        group = placement_group(self._bundles, strategy="STRICT_PACK")
        try:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            actor = self._actor.options(**self._options, scheduling_strategy=where).remote(*arguments)
        except BaseException:
            remove_placement_group(group)
            raise
        return Grouped(actor, group)


def end(actor: Any) -> None:
    """Kill an actor and give back what it had; does nothing about one that is gone or was never started."""
    grouped = isinstance(actor, Grouped)
    with contextlib.suppress(Exception):
        ray.kill(actor.actor if grouped else actor)
    if grouped:
        with contextlib.suppress(Exception):  # the cluster may be gone
            remove_placement_group(actor.group)
