"""What the parts of training are for, on the bundled pair: each is left out, or changed, with several seeds.

Four kinds of runs are trained: the demo configuration with fewer updates, the same without its warm start, at a
temperature, and with fewer draft tokens. The labels that the warm start of the first kind was fitted to are kept, and
fitted again: alone, by logistic regression, and without one group of the statistics after another. A statistic is left
out by giving the network its mean instead, which is 0 after standardising. Each arbiter's threshold is chosen on
calibration problems, as ``cospec calibrate`` chooses it; test problems are the same for all.

    python benchmarks/ablations.py --work runs/ablations --json benchmarks/results/ablations.json

What has been trained or measured is kept in the directory of ``--work`` and not done again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ablation_rows import AblationRow, markdown, paired, save_row, saved_rows
from benchmarks.command import run as run_command
from vllm_cospec.atomic import new_file
from vllm_cospec.kernels.statistics import INDEX
from vllm_cospec.training.commands import DEMO_CONFIG, notice
from vllm_cospec.training.config import TrainConfig, load_train_config
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.learning.linear import linear_arbiter, logistic_regression
from vllm_cospec.training.measure.calibrate import CHUNK, Answered, Part, SweepActor, chosen
from vllm_cospec.training.measure.evaluate import evaluate
from vllm_cospec.training.measure.fixed_sequence import STRICT, threshold_sequence
from vllm_cospec.training.measure.modes import parse_mode
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.measure.thresholds import Sweep
from vllm_cospec.training.preflight import CALIBRATION_SEED
from vllm_cospec.training.rollout.actors import EngineActor, remote
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.tasks import Problem, load_task
from vllm_cospec.training.trainer import Trainer

GROUPS = {
    "target": (
        "target_logprob_draft", "target_logprob_top", "target_top2_gap", "target_entropy", "target_rank_draft",
    ),
    "draft": (
        "draft_logprob_draft", "draft_logprob_target", "draft_top2_gap", "draft_entropy", "kl_draft_target",
    ),
    "place in the block": ("block_position", "matches_before"),
    "what follows in the block": ("lookahead_matches",),
    "overrides so far": ("overrides_in_block", "overrides_so_far"),
    "position in the response": ("output_position",),
}  # fmt: skip
NO_SCALE = 1e30  # a statistic divided by it is 0
BOTH, TEMPERATURE, FEWER = "warm start and RL", 0.7, 4
# the best of 85 settings on 500 calibration problems, see benchmarks/results/pareto_demo.json
RULE = "relaxed_topk(top_n=10, delta=0.9)"

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """Runs that are trained alike, but for their seed; and where their arbiters are served."""

    name: str
    changes: dict[str, dict[str, Any]]  # of the configuration, by table
    served: tuple[tuple[float, int | None], ...]  # temperature, K (None: the configuration's)


KINDS = (
    Kind(BOTH, {}, ((0.0, None), (TEMPERATURE, None))),
    Kind("RL alone", {"learner": {"warm_start_iterations": 0}}, ((0.0, None),)),
    Kind("trained at T = 0.7", {"rollout": {"temperature": TEMPERATURE}}, ((TEMPERATURE, None), (0.0, None))),
    Kind("trained with K = 4", {"pair": {"num_speculative_tokens": FEWER}}, ((0.0, None), (0.0, FEWER))),
)


def changed(config: TrainConfig, changes: dict[str, dict[str, Any]], **top: Any) -> TrainConfig:
    """Return a configuration with some settings changed, by table, and some outside of any."""
    found = config.model_dump()
    for table, settings in changes.items():
        found[table] |= settings
    return TrainConfig.model_validate(found | top)


class LabelKeeper(Trainer):
    """A run that keeps the labels of its warm start."""

    def _learn(self, iteration: int, episodes: Episodes) -> dict[str, float]:
        if iteration < self.config.learner.warm_start_iterations:
            labels = {
                "statistics": torch.from_numpy(episodes.statistics[episodes.branch_decision]),
                "worth": torch.from_numpy(episodes.difference() * episodes.branch_weight),
            }
            with new_file(self.output / f"labels-{iteration}.safetensors") as partial:
                save_file(labels, partial)
        return super()._learn(iteration, episodes)


def train(config: TrainConfig, output: Path) -> Weights:
    """Train a run, or go on with it; returns the weights of the arbiter that would ship."""
    kept = output / "arbiter.safetensors"
    if not kept.is_file():
        trainer = LabelKeeper(config, output, resume=output.is_dir(), say=notice)
        trainer.run()
        with new_file(kept) as partial:
            save_file(trainer.shipped()[1].state_dict(), partial)
    return load_file(kept)


def labels_of(output: Path, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the statistics and the worth of the branches of a run's warm start, float32 [B, 16] and float64 [B]."""
    parts = [
        load_file(output / f"labels-{iteration}.safetensors")
        for iteration in range(config.learner.warm_start_iterations)
    ]
    return torch.cat([p["statistics"] for p in parts]).numpy(), torch.cat([p["worth"] for p in parts]).numpy()


def standardised(trained: Weights, without: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """Return mean and scale of a run, the scale so that some statistics become 0."""
    scale = trained["scale"].clone()
    scale[[INDEX[name] for name in without]] = NO_SCALE
    return trained["mean"].clone(), scale


def warm_start(
    config: TrainConfig, trained: Weights, statistics: np.ndarray, worth: np.ndarray, without: tuple[str, ...] = ()
) -> Weights:
    """Fit the network to labels as the run did, without some of the statistics."""
    learner = Learner(config.learner, config.seed, 1)
    mean, scale = standardised(trained, without)
    learner.arbiter.mean.copy_(mean)
    learner.arbiter.scale.copy_(scale)
    learner.warm_start(statistics, worth)
    return learner.weights()


def logistic(config: TrainConfig, trained: Weights, statistics: np.ndarray, worth: np.ndarray) -> Weights:
    """Fit logistic regression to labels, to its optimum; returns a network that computes it."""
    mean, scale = standardised(trained)
    labelled = np.flatnonzero(worth)
    x = ((torch.from_numpy(statistics[labelled]) - mean) / scale).double()
    keep, weight = torch.from_numpy(worth[labelled] > 0).double(), torch.from_numpy(np.abs(worth[labelled])).double()
    weights, bias = logistic_regression(x, keep, weight, penalty=1e-6)
    found = linear_arbiter(weights.float(), bias.float(), tuple(config.learner.hidden_sizes))
    return {**found.state_dict(), "mean": mean, "scale": scale}


@dataclass(frozen=True)
class Piece(Part):
    """Some problems for one arbiter."""

    arbiter: str

    @property
    def key(self) -> Any:
        """Identifies it."""
        return self.arbiter, self.thresholds, self.temperature, self.index


class Judge(SweepActor):
    """An engine that answers problems with the arbiter that comes along."""

    def __init__(self, config: TrainConfig, weights: Weights):
        arbiter = {"hidden_sizes": tuple(config.learner.hidden_sizes), "state_dict": weights}
        EngineActor.__init__(self, config.pair, config.task, arbiter)
        self._max_tokens = config.rollout.max_tokens

    def work(self, part: Part, payload: Any) -> Answered:
        """Answer some problems."""
        self.ready()
        self._engine.set_arbiter(payload, sample_actions=False)
        return super().work(part, None)


@dataclass(frozen=True)
class Questions:
    """What everything is measured on."""

    calibration: list[Problem]
    test: list[Problem]


def judged(
    pool: Pool, name: str, weights: Weights, problems: list[Problem], thresholds: tuple[float, ...], temperature: float
) -> Sweep:
    """Answer problems at thresholds."""
    pieces = [
        Piece(i, tuple(problems[first : first + CHUNK]), thresholds, temperature, 1.0, name)
        for i, first in enumerate(range(0, len(problems), CHUNK))
    ]
    pool.submit(pieces, ray.put(weights))
    return Sweep.merge([one.sweep for done in pool.collect([p.key for p in pieces]) for one in done])


def measure(pool: Pool, row: AblationRow, weights: Weights, problems: Questions, config: TrainConfig) -> AblationRow:
    """Choose a threshold on calibration problems, and answer the test problems with it; strict has none to choose."""
    key = f"{row.variant}/{row.seed}/{row.num_speculative_tokens}"
    threshold = STRICT
    if row.variant != "strict":
        sequence = threshold_sequence(config.calibration.thresholds)
        found = judged(pool, key, weights, problems.calibration, sequence, row.temperature)
        threshold = sequence[chosen(found, config)[1]]
    test = judged(pool, key, weights, problems.test, (threshold,), row.temperature)
    return row.with_outcome(test.outcome(0), threshold)


def variants(kind: Kind) -> list[str]:
    """Return what a run gives: its arbiter and, of the first kind, what its warm start gives without more training."""
    more = ["warm start alone", "logistic regression", *(f"without {group}" for group in GROUPS)]
    return [kind.name, *more] if kind.name == BOTH else [kind.name]


def weights_of(variant: str, config: TrainConfig, trained: Weights, output: Path) -> Weights:
    """Return the weights of one of :func:`variants`."""
    if variant == "warm start alone":
        return warm_start(config, trained, *labels_of(output, config))
    if variant == "logistic regression":
        return logistic(config, trained, *labels_of(output, config))
    if variant.startswith("without "):
        names = GROUPS[variant.removeprefix("without ")]
        return warm_start(config, trained, *labels_of(output, config), without=names)
    return trained


def rows_wanted(kind: Kind, variant: str, seed: int, default: int) -> list[AblationRow]:
    """Return where an arbiter is to be served; what is fitted to a warm start again, as the run was trained only."""
    served = kind.served if variant == kind.name else kind.served[:1]
    return [AblationRow(variant, seed, temperature, k or default) for temperature, k in served]


def serve(
    config: TrainConfig, wanted: list[tuple[AblationRow, Weights]], problems: Questions, work: Path, end: float
) -> None:
    """Measure some rows until it is ``end``, with one set of engines for each K."""
    if time.monotonic() > end:
        return
    for k in sorted({row.num_speculative_tokens for row, _ in wanted}, reverse=True):
        own = changed(config, {"pair": {"num_speculative_tokens": k}})
        actor = remote(Judge, own.rollout.cpus_per_actor, own.rollout.gpus_per_actor)
        first = wanted[0][1]
        with (
            engines_session(own, notice),
            Pool(lambda: actor.remote(own, first), own.rollout.actors, depth=1) as pool,  # noqa: B023
        ):
            for row, weights in wanted:
                if row.num_speculative_tokens == k and time.monotonic() < end:
                    save_row(work, measure(pool, row, weights, problems, own))
                    notice(f"{time.strftime('%H:%M:%S')} {row.key}")


def measure_rule(config: TrainConfig, problems: Questions, work: Path) -> None:
    """Answer the test problems by the rule that did best on calibration problems."""
    row = AblationRow(RULE, 0, 0.0, config.pair.num_speculative_tokens)
    if row.key in {found.key for found in saved_rows(work)}:
        return
    with engines_session(config, notice):
        found = evaluate(config.pair, config.task, config.rollout, [parse_mode(RULE)], problems.test)
    save_row(work, row.with_outcome(found[RULE].outcome, None))


def main(
    work: Annotated[Path, typer.Option(help="Directory of what has been trained and measured.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds, from 1 on.")] = 3,
    iterations: Annotated[int, typer.Option(min=8, help="Updates of each run.")] = 16,
    calibration: Annotated[int, typer.Option(min=20, help="Calibration problems.")] = 500,
    test: Annotated[int, typer.Option(min=20, help="Test problems.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Begin nothing more after so long.")] = float("inf"),
) -> None:
    """Train and measure what is missing."""
    end = time.monotonic() + 60 * minutes
    demo = load_train_config(DEMO_CONFIG)
    task = load_task(demo.task.name, **demo.task.options)
    problems = Questions(
        task.problems(CALIBRATION_SEED, calibration, "calibration"), task.problems(4242, test, "test")
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)

    k = demo.pair.num_speculative_tokens
    for kind in KINDS:
        done = {row.key for row in saved_rows(work)}
        wanted: list[tuple[AblationRow, Weights]] = []
        for seed in range(1, seeds + 1):
            config = changed(demo, kind.changes, seed=seed, iterations=iterations)
            output = work / f"{kind.name.replace(' ', '-').replace('=', '')}-{seed}"
            missing = [
                (variant, row)
                for variant in variants(kind)
                for row in rows_wanted(kind, variant, seed, k)
                if row.key not in done
            ]
            if not missing or (time.monotonic() > end and not (output / "arbiter.safetensors").is_file()):
                continue
            trained = train(config, output)
            notice(f"{time.strftime('%H:%M:%S')} trained: {output}")
            wanted += [(row, weights_of(variant, config, trained, output)) for variant, row in missing]
        if kind.name == BOTH and wanted:
            strict = [AblationRow("strict", 0, t, k) for t in (0.0, TEMPERATURE)]
            wanted += [(row, wanted[0][1]) for row in strict if row.key not in done]
        serve(demo, wanted, problems, work, end)
        if kind.name == BOTH and time.monotonic() < end:
            measure_rule(demo, problems, work)
    rows = saved_rows(work)
    if json_path is not None:
        how = f"{iterations} updates a run; {calibration} calibration and {test} test problems, seed 4242"
        write_result(json_path, {"settings": how, "rule": RULE, "rows": [row.as_json() for row in rows]})
    print(markdown(rows, RULE))
    rule = next((row for row in rows if row.variant == RULE), None)
    for row in rows:
        if rule and row.seed and (row.temperature, row.num_speculative_tokens) == (0.0, k):
            print(f"{row.key}, against {RULE}: {paired(row, rule)}")


if __name__ == "__main__":
    run_command(main)
