"""The training loop: problems to actors, episodes to the learner, weights back, a checkpoint after every update.

An iteration's rollouts use the weights of up to ``max_staleness`` updates before, so that the next units are under way
while the learner works; which ones exactly depends on the iteration's number alone. Together with units that do not
depend on where they are done, this makes a run that was stopped and resumed end with the same weights as one that was
not.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from vllm_cospec.atomic import write_text
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import TrainConfig, require_models
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.learning.advantages import load_advantage
from vllm_cospec.training.learning.checkpoint import Checkpoint, load_latest, save_checkpoint
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.measure.report import Report
from vllm_cospec.training.rollout.actors import RolloutActor, remote
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import ray_session
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import Problem, load_task
from vllm_cospec.training.tasks.rewards import load_reward

CONFIG_FILE, CHECKPOINTS = "config.json", "checkpoints"
# What may differ between a run and its continuation: none of it changes a result.
FREE = {"ray_address"}
FREE_IN_ROLLOUT = {"actors", "cpus_per_actor", "gpus_per_actor", "unit_timeout_s", "start_timeout_s", "attempts"}
# What may differ because it is the way out of an error: a loss that is not finite, a reward that takes too long.
FREE_IN_LEARNER, FREE_IN_TASK = {"learning_rate"}, {"reward_timeout_s"}


class Trainer:
    """One run, in a directory of its own."""

    def __init__(self, config: TrainConfig, output: Path, resume: bool):
        """Check the configuration and the directory; nothing is started yet.

        Raises:
            ConfigError: something does not fit.
        """
        torch.set_num_threads(1)  # the network is tiny, and actors want the cores
        require_models(config.pair)
        self.config, self.output = config, output
        self._task = load_task(config.task.name, **config.task.options)
        load_reward(config.task.reward, self._task)
        self._advantage = load_advantage(config.learner.advantage)
        self._warm = config.learner.warm_start_iterations
        self.learner = Learner(config.learner, config.seed, config.iterations - self._warm)
        self._version = 0
        self._history: dict[int, dict[str, Tensor]] = {0: self.learner.weights()}
        self._labels: list[tuple[np.ndarray, np.ndarray]] = []
        self._set_aside: list[str] = []
        self.totals: dict[str, float] = {}
        found = load_latest(output / CHECKPOINTS) if resume else None
        if found is not None:
            self._restore(found)
        elif output.exists() and any(output.iterdir()) and not resume:
            raise ConfigError(f"--output: {output} is not empty; pass --resume to continue it, or another directory")
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / CONFIG_FILE, config.model_dump_json(indent=2) + "\n")

    @property
    def updates(self) -> int:
        """Number of updates that have been taken; each of them has its checkpoint."""
        return self._version

    @property
    def finished(self) -> bool:
        """Whether all updates have been taken."""
        return self._version == self.config.iterations

    def run(self) -> None:
        """Take all updates that are left.

        Raises:
            CoSpecError: training cannot go on; the last checkpoint is intact.
        """
        if self.finished:
            return
        rollout = self.config.rollout
        with (
            Report(self.output, self.config.iterations, self._version) as report,
            ray_session(self.config.ray_address, rollout.actors * rollout.cpus_per_actor),
        ):
            began = time.perf_counter()
            report.say(f"starting {rollout.actors} engines")
            actor = remote(RolloutActor, rollout.cpus_per_actor, rollout.gpus_per_actor)
            first = self._history[max(self._history)]
            with Pool(
                lambda: actor.remote(self.config, first),
                rollout.actors,
                rollout.attempts,
                rollout.unit_timeout_s,
                rollout.start_timeout_s,
                notice=report.say,
            ) as pool:
                pool.wait_until_ready()
                now = time.perf_counter()
                self.totals["start_seconds"] = self.totals.get("start_seconds", 0.0) + now - began
                began = now
                for iteration, episodes in self._episodes(pool, report):
                    with interrupts_held_back():  # an update that was begun is taken and saved
                        metrics = self._learn(iteration, episodes)
                        self._set_aside += [problem.prompt for unit in pool.set_aside for problem in unit.problems]
                        pool.set_aside.clear()
                        now = time.perf_counter()
                        self._count(episodes, now - began)
                        began = now
                        metrics["idle_share"] = self.idle_share
                        # logged first: a line without its checkpoint is dropped when the run is resumed
                        report.update(iteration, {**self._summary(episodes), **metrics})
                        self._save()
        if self._set_aside:
            report.say(f"{len(self._set_aside)} prompts always lost their actor and were set aside")

    @property
    def idle_share(self) -> float:
        """Share of the actors' time that was not spent generating, from the moment all of them were ready."""
        return self._idle(self.totals.get("actor_seconds", 0.0))

    @property
    def idle_share_with_start(self) -> float:
        """The same share, with the time in which the engines started."""
        started = self.totals.get("start_seconds", 0.0) * self.config.rollout.actors
        return self._idle(self.totals.get("actor_seconds", 0.0) + started)

    def _idle(self, seconds: float) -> float:
        return 1 - self.totals.get("generating_seconds", 0.0) / seconds if seconds else float("nan")

    def version_for(self, iteration: int) -> int:
        """Return the number of updates the weights of an iteration's rollouts have seen."""
        if iteration < self._warm:
            return 0
        return max(self._warm, iteration - self.config.rollout.max_staleness)

    def units(self, iteration: int) -> list[Unit]:
        """Return an iteration's work; the same for the same configuration."""
        rollout = self.config.rollout
        problems = self._problems(iteration, rollout.prompts_per_iteration)
        size = rollout.prompts_per_unit
        return [
            Unit(iteration, index, tuple(problems[first : first + size]), first, self.config.seed)
            for index, first in enumerate(range(0, len(problems), size))
        ]

    def _problems(self, iteration: int, count: int) -> list[Problem]:
        return self._task.problems(seed=self.config.seed * 1_000_003 + iteration, n=count, split="train")

    def _episodes(self, pool: Pool, report: Report) -> Iterator[tuple[int, Episodes]]:
        """Yield (iteration, episodes) in order, with as much under way as staleness allows."""
        references: dict[int, Any] = {}
        submitted = self._version
        under_way: dict[int, list[Any]] = {}
        for iteration in range(self._version, self.config.iterations):
            while submitted < self.config.iterations and self.version_for(submitted) <= self._version:
                version = self.version_for(submitted)
                if version not in references:
                    references[version] = ray.put(self._history[version])
                units = self.units(submitted)
                pool.submit(units, references[version])
                under_way[submitted] = [unit.key for unit in units]
                submitted += 1
            keys = under_way.pop(iteration)
            results = pool.collect(keys, tick=lambda parts: report.progress(sum(len(p.problem) for p in parts)))
            yield iteration, Episodes.merge([part for parts in results for part in parts])
            references = {v: r for v, r in references.items() if v >= self.version_for(submitted - 1)}

    def _learn(self, iteration: int, episodes: Episodes) -> dict[str, float]:
        """Take one update from an iteration's episodes."""
        if not self.learner.normalised and len(episodes.statistics):
            self.learner.normalise(episodes.statistics)
        metrics: dict[str, float] = {}
        if iteration < self._warm:
            at = episodes.branch_decision
            self._labels.append((episodes.statistics[at], episodes.branch_keep - episodes.branch_drop))
            if iteration == self._warm - 1:
                statistics, difference = (np.concatenate(parts) for parts in zip(*self._labels, strict=True))
                metrics = self.learner.warm_start(statistics, difference)
                self._labels = []
        else:
            metrics = self.learner.update(self._advantage(episodes, self.config.learner.speed_weight))
        self._version = iteration + 1
        self._history[self._version] = self.learner.weights()
        oldest = min(self.version_for(self._version), self._version)
        self._history = {version: weights for version, weights in self._history.items() if version >= oldest}
        return metrics

    def _count(self, episodes: Episodes, seconds: float) -> None:
        for name, value in (
            ("responses", len(episodes.reward)),
            ("branches", len(episodes.branch_decision)),
            ("generated_tokens", episodes.generated_tokens),
            ("generating_seconds", episodes.generating_s),
            ("actor_seconds", seconds * self.config.rollout.actors),
            ("seconds", seconds),
        ):
            self.totals[name] = self.totals.get(name, 0.0) + value

    def _summary(self, episodes: Episodes) -> dict[str, float]:
        difference = episodes.branch_keep - episodes.branch_drop
        decisions, responses = len(episodes.kept), len(episodes.reward)
        return {
            "accuracy": float(episodes.reward.mean()) if responses else float("nan"),
            "acceptance_length": Counts(episodes.drafts, episodes.accepted).acceptance_length,
            "override_rate": float(episodes.kept.mean()) if decisions else float("nan"),
            "mismatches_per_response": decisions / max(1, responses),
            "capped": float(episodes.capped.mean()) if responses else float("nan"),
            "branches": float(len(difference)),
            "keep_was_better": float((difference > 0.5).mean()) if len(difference) else float("nan"),
            "keep_was_worse": float((difference < -0.5).mean()) if len(difference) else float("nan"),
            "generated_tokens": self.totals["generated_tokens"],
            "rollouts_per_s": (responses + len(difference)) / max(episodes.busy_s, 1e-9) * self.config.rollout.actors,
            "seconds": self.totals["seconds"],
        }

    def _save(self) -> None:
        tensors = self.learner.state()
        for version, weights in self._history.items():
            tensors |= {f"history.{version}.{name}": tensor for name, tensor in weights.items()}
        for i, (statistics, difference) in enumerate(self._labels):
            tensors[f"labels.{i}.statistics"] = torch.from_numpy(statistics)
            tensors[f"labels.{i}.difference"] = torch.from_numpy(difference)
        facts = {
            "config": json.loads(self.config.model_dump_json()),
            "totals": self.totals,
            "set_aside": self._set_aside,
        }
        save_checkpoint(self.output / CHECKPOINTS, Checkpoint(self._version, tensors, facts))

    def _restore(self, checkpoint: Checkpoint) -> None:
        _same(_essential(checkpoint.facts["config"]), _essential(json.loads(self.config.model_dump_json())), "")
        self.learner.load_state(checkpoint.tensors)
        self._version = checkpoint.updates
        self.totals, self._set_aside = checkpoint.facts["totals"], checkpoint.facts["set_aside"]
        self._history = {}
        labels: dict[int, dict[str, Any]] = {}
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            number, _, field = rest.partition(".")
            if kind == "history":
                self._history.setdefault(int(number), {})[field] = tensor
            elif kind == "labels":
                labels.setdefault(int(number), {})[field] = tensor.numpy()
        self._labels = [(labels[i]["statistics"], labels[i]["difference"]) for i in sorted(labels)]


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C take effect after the block only. Does nothing outside of the main thread, where no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda signum, frame: pressed.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    """The settings a result depends on."""
    rest = {key: value for key, value in config.items() if key not in FREE}
    for part, free in (("rollout", FREE_IN_ROLLOUT), ("learner", FREE_IN_LEARNER), ("task", FREE_IN_TASK)):
        rest[part] = {key: value for key, value in config[part].items() if key not in free}
    return rest


def _same(old: Any, new: Any, where: str) -> None:
    """Refuse to continue a run with other settings; names the first that differs."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            _same(old[key], new[key], f"{where}.{key}" if where else key)
    elif old != new:
        raise ConfigError(
            f"--resume: {where} was {old!r} when the run began and is {new!r} now; set it back, or start anew in "
            f"another directory"
        )
