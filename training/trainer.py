"""The training loop: problems to actors, episodes to the learner, weights back, a checkpoint after every update.

An iteration's rollouts use the weights of up to ``max_staleness`` updates before, so that the next units are under way
while the learner works; which ones exactly depends on the iteration's number alone. Together with units that do not
depend on where they are done, this makes a run that was stopped and resumed end with the same weights as one that was
not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.atomic import write_text
from vllm_cospec.errors import ConfigError, TrainingError
from vllm_cospec.server import interrupts_held_back
from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.continuation import check_continuation, fingerprints, settings_of
from vllm_cospec.training.learning.advantages import branch_returns, load_advantage
from vllm_cospec.training.learning.checkpoint import Checkpoint, load_latest, save_checkpoint
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.learning.overlong import treat_overlong
from vllm_cospec.training.measure.report import Report
from vllm_cospec.training.preflight import Say, check_training, held_out_problems
from vllm_cospec.training.rollout.actors import RolloutActor
from vllm_cospec.training.rollout.episodes import Episodes, saved
from vllm_cospec.training.rollout.placement import Placed
from vllm_cospec.training.rollout.pool import Pool, UnitPool
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tally import Tally
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.grading import FailureWatch

CONFIG_FILE, CHECKPOINTS, FAILURES, RAY_LOGS = "config.json", "checkpoints", "grader_failures.txt", "ray-logs"
PATIENCE = 4  # iterations without a warm start after which something must have been telling
HELD_OUT = -1  # stands for the iteration of held-out problems: they always come with the same random numbers
SERVED_THRESHOLD = 0.5  # that of an arbiter before it is calibrated

Weights = dict[str, Tensor]


class Trainer:
    """One run, in a directory of its own."""

    def __init__(self, config: TrainConfig, output: Path, resume: bool, say: Say = lambda text: None):
        """Check the configuration, the problems and the directory; nothing is started yet.

        Args:
            config: of the run.
            output: its directory.
            resume: go on from the last checkpoint there.
            say: called with what was left out.

        Raises:
            ConfigError: something does not fit.
        """
        torch.set_num_threads(1)  # the network is tiny, and actors want the cores
        if output.exists() and not resume and any(output.iterdir()):
            raise ConfigError(f"--output: {output} is not empty; pass --resume to continue it, or another directory")
        self.config, self.output = config, output
        self._problems = check_training(config, say)
        self._held_out = held_out_problems(config, self._problems)
        self._advantage = load_advantage(config.learner.advantage)
        self._warm = config.learner.warm_start_iterations
        self._prints = fingerprints(config)
        self.learner = Learner(config.learner, config.seed, config.iterations - self._warm)
        self.tally = Tally(config.rollout.actors)
        self._version = 0
        self._history: dict[int, Weights] = {0: self.learner.weights()}
        self._labels: list[tuple[np.ndarray, np.ndarray]] = []  # of the warm start
        self._branches: list[tuple[np.ndarray, np.ndarray]] = []  # statistics and worth of all, where they are fitted
        self._set_aside: list[str] = []
        self._evaluated = 0  # the update that was evaluated last
        self._best: tuple[int, float, Weights] | None = None  # updates, worth, weights
        found = load_latest(output / CHECKPOINTS) if resume else None
        if found is not None:
            self._restore(found)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / CONFIG_FILE, config.model_dump_json(indent=2) + "\n")

    @property
    def updates(self) -> int:
        """Number of updates that have been taken; each of them has its checkpoint."""
        return self._version

    @property
    def finished(self) -> bool:
        """Whether all updates have been taken, and the last one was evaluated."""
        return self._version == self.config.iterations and not self._due()

    def shipped(self) -> tuple[int, Arbiter]:
        """Return the update that did best on the held-out problems, and its arbiter; else the last one's."""
        if self._best is None:
            return self._version, self.learner.arbiter
        arbiter = Arbiter(self.learner.arbiter.hidden_sizes)
        arbiter.load_state_dict(self._best[2])
        return self._best[0], arbiter

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
            engines_session(self.config, report.say, self.output / RAY_LOGS),
        ):
            began = time.perf_counter()
            report.say(f"starting {rollout.actors} engines")
            actor = Placed(RolloutActor, self.config.pair, rollout)
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
                self.tally.started(time.perf_counter() - began)
                self._run(pool, report)
        if self._set_aside:
            report.say(f"{len(self._set_aside)} prompts always lost their actor and were set aside")

    def run_with(self, pool: UnitPool) -> None:
        """Take all updates that are left, with engines that are there already; with the same units, the same weights.

        Raises:
            CoSpecError: training cannot go on; the last checkpoint is intact.
        """
        if self.finished:
            return
        with Report(self.output, self.config.iterations, self._version) as report:
            self._run(pool, report)

    def _run(self, pool: UnitPool, report: Report) -> None:
        watch = FailureWatch(
            self.config.task.max_failed_rewards,
            int(self.tally["responses"] + self.tally["branches"]),
            int(self.tally["grader_failures"]),
        )
        if self._due():  # stopped between an update and its evaluation
            report.held_out(self._version, self._evaluate(pool))
            self._save()
        began = time.perf_counter()
        for iteration, episodes in self._episodes(pool, report):
            self._show_failures(episodes, report)
            watch.add(episodes.graded, episodes.failures)
            with interrupts_held_back():  # an update that was begun is taken and saved
                metrics = self._learn(iteration, episodes)
                self._set_aside += [problem.prompt for unit in pool.set_aside for problem in unit.problems]
                pool.set_aside.clear()
                now = time.perf_counter()
                self.tally.count(episodes, now - began)
                began = now
                self._check_telling(iteration, episodes)
                # logged first: a line without its checkpoint is dropped when the run is resumed
                report.update(iteration, {**self.tally.figures(episodes), **metrics})
                self._save()
            if self._due():
                report.held_out(self._version, self._evaluate(pool))
                self._save()

    def _show_failures(self, episodes: Episodes, report: Report) -> None:
        """Say what could not be graded, once an iteration, and keep all of it in a file."""
        if not episodes.failures:
            return
        report.say(
            f"{len(episodes.failures)} of {episodes.graded} answers could not be graded and scored 0; the first: "
            f"{episodes.failures[0]} (all are in {FAILURES})"
        )
        with (self.output / FAILURES).open("a") as file:
            file.writelines(f"{failure}\n" for failure in episodes.failures)

    def version_for(self, iteration: int) -> int:
        """Return the number of updates the weights of an iteration's rollouts have seen."""
        if iteration < self._warm:
            return 0
        return max(self._warm, iteration - self.config.rollout.max_staleness)

    def units(self, iteration: int) -> list[Unit]:
        """Return an iteration's work; the same for the same configuration."""
        problems = self._problems.draw(
            self.config.seed * 1_000_003 + iteration, self.config.rollout.prompts_per_iteration, "train",
            "rollout.prompts_per_iteration", {problem.prompt for problem in self._held_out},
        )  # fmt: skip
        return self._units(iteration, problems)

    def _units(self, iteration: int, problems: list[Problem], **options: Any) -> list[Unit]:
        size = self.config.rollout.prompts_per_unit
        return [
            Unit(iteration, index, tuple(problems[first : first + size]), first, self.config.seed, **options)
            for index, first in enumerate(range(0, len(problems), size))
        ]

    def _episodes(self, pool: UnitPool, report: Report) -> Iterator[tuple[int, Episodes]]:
        """Yield (iteration, episodes) in order, with as much under way as staleness allows."""
        references: dict[int, Any] = {}
        submitted = self._version
        under_way: dict[int, list[Any]] = {}
        for iteration in range(self._version, self.config.iterations):
            while submitted < self.config.iterations and self.version_for(submitted) <= self._version:
                version = self.version_for(submitted)
                if version not in references:
                    references[version] = pool.put(self._history[version])
                units = self.units(submitted)
                pool.submit(units, references[version])
                under_way[submitted] = [unit.key for unit in units]
                submitted += 1
            keys = under_way.pop(iteration)
            results = pool.collect(keys, tick=lambda parts: report.progress(sum(len(p.problem) for p in parts)))
            yield iteration, Episodes.merge([part for parts in results for part in parts])
            references = {v: r for v, r in references.items() if v >= self.version_for(submitted - 1)}

    def _due(self) -> bool:
        """Whether the present weights are to be evaluated on the held-out problems and have not been."""
        every = self.config.selection.every
        if not every or self._version <= self._warm - (self._warm > 0):
            return False
        last = self._version == self.config.iterations
        return (last or self._version % every == 0) and self._evaluated < self._version

    def _evaluate(self, pool: UnitPool) -> Episodes:
        """Answer the held-out problems as they would be served, and remember the weights if none did better."""
        units = self._units(HELD_OUT, self._held_out, threshold=SERVED_THRESHOLD, branches=False)
        pool.submit(units, pool.put(self._history[self._version]))
        results = pool.collect([unit.key for unit in units])
        episodes = Episodes.merge([part for parts in results for part in parts])
        gain = self.config.learner.speed_weight * saved(episodes.steps, episodes.tokens)
        worth = float((episodes.reward + gain).mean()) if len(episodes.reward) else 0.0
        if self._best is None or worth >= self._best[1]:
            self._best = self._version, worth, self.learner.weights()
        self._evaluated = self._version
        return episodes

    def _learn(self, iteration: int, episodes: Episodes) -> dict[str, float]:
        """Take one update from an iteration's episodes."""
        if not self.learner.normalised and len(episodes.statistics):
            self.learner.normalise(episodes.statistics)
        episodes = treat_overlong(episodes, self.config.learner)
        metrics: dict[str, float] = {}
        learner = self.config.learner
        if learner.objective == "labels":
            kept, dropped = branch_returns(episodes, learner.speed_weight)
            worth = (kept - dropped) * episodes.branch_weight
            self._branches.append((episodes.statistics[episodes.branch_decision], worth))
        if iteration < self._warm:
            worth = episodes.difference() * episodes.branch_weight
            self._labels.append((episodes.statistics[episodes.branch_decision], worth))
            if iteration == self._warm - 1:
                statistics, difference = (np.concatenate(parts) for parts in zip(*self._labels, strict=True))
                metrics = self.learner.warm_start(statistics, difference)
                self._labels = []
        elif learner.objective == "labels":
            statistics, worth = (np.concatenate(parts) for parts in zip(*self._branches, strict=True))
            metrics = self.learner.fit(statistics, worth, len(episodes.branch_decision))
        else:
            metrics = self.learner.update(self._advantage(episodes, learner.speed_weight))
        self._version = iteration + 1
        self._history[self._version] = self.learner.weights()
        oldest = min(self.version_for(self._version), self._version)
        self._history = {version: weights for version, weights in self._history.items() if version >= oldest}
        return metrics

    def _check_telling(self, iteration: int, episodes: Episodes) -> None:
        """End a run in which no decision has changed an answer: all it could learn is to keep everything.

        Raises:
            TrainingError: with the counts.
        """
        branching = self.config.learner.advantage == "branch"
        if not branching or self.tally["telling_branches"] or iteration + 1 < (self._warm or PATIENCE):
            return
        raise TrainingError(
            f"learner: none of {self.tally['branches']:.0f} branches at the mismatches of "
            f"{self.tally['responses']:.0f} responses changed its answer (mean reward {episodes.reward.mean():.3f}); "
            f"check task.reward, or raise warm_start_iterations"
        )

    def _save(self) -> None:
        tensors = self.learner.state()
        for version, weights in self._history.items():
            tensors |= {f"history.{version}.{name}": tensor for name, tensor in weights.items()}
        for kind, kept in (("labels", self._labels), ("branches", self._branches)):
            for i, (statistics, difference) in enumerate(kept):
                tensors[f"{kind}.{i}.statistics"] = torch.from_numpy(statistics)
                tensors[f"{kind}.{i}.difference"] = torch.from_numpy(difference)
        if self._best is not None:
            tensors |= {f"best.0.{name}": tensor for name, tensor in self._best[2].items()}
        facts = {
            "config": settings_of(self.config),
            "fingerprints": self._prints,
            "totals": self.tally.totals,
            "set_aside": self._set_aside,
            "evaluated": self._evaluated,
            "best": None if self._best is None else self._best[:2],
        }
        save_checkpoint(self.output / CHECKPOINTS, Checkpoint(self._version, tensors, facts))

    def _restore(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        check_continuation(facts, self.config, checkpoint.updates)
        self.learner.load_state(checkpoint.tensors)
        self._version, self._evaluated = checkpoint.updates, facts["evaluated"]
        self.tally = Tally(self.config.rollout.actors, facts["totals"])
        self._set_aside = facts["set_aside"]
        parts: dict[str, dict[int, dict[str, Any]]] = {"history": {}, "labels": {}, "branches": {}, "best": {}}
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            number, _, field = rest.partition(".")
            if kind in parts:
                parts[kind].setdefault(int(number), {})[field] = tensor
        self._history = parts["history"]
        self._labels, self._branches = (
            [(part[i]["statistics"].numpy(), part[i]["difference"].numpy()) for i in sorted(part)]
            for part in (parts["labels"], parts["branches"])
        )
        self._best = (*facts["best"], parts["best"][0]) if facts["best"] is not None else None
