"""What the parts of training are for: each is left out, or changed, with several seeds.

Four kinds of runs are trained: a configuration's, by default the bundled pair's, with fewer updates; the same without
its warm start, at a temperature, and with fewer draft tokens. The labels that the warm start of the first kind was
fitted to are kept, and fitted again: alone, by logistic regression, and without one group of the statistics after
another. A statistic is left out by giving the network its mean instead, which is 0 after standardising. Each arbiter's
threshold is chosen on calibration problems, as ``cospec calibrate`` chooses it; test problems are the same for all.

    python benchmarks/ablations.py --work runs/ablations --json benchmarks/results/ablations.json
    python benchmarks/ablations.py --work DIR --config training/configs/code_gpu.toml --rule "mixture(weight=0.5)" \
        --test-seed 2026 --in-process 5    # with one engine in this process, and no Ray

What has been trained or measured is kept in the directory of ``--work`` and not done again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ablation_engines import Engines, OneEngine, OnRay, Piece
from benchmarks.ablation_rows import AblationRow, markdown, paired, save_row, saved_rows
from benchmarks.command import run as run_command
from benchmarks.sweep import numbers
from vllm_cospec.atomic import new_file
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.statistics import INDEX
from vllm_cospec.training.artefact import portable
from vllm_cospec.training.commands import DEMO_CONFIG, notice
from vllm_cospec.training.config import TrainConfig, load_train_config
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.learning.linear import linear_arbiter, logistic_regression
from vllm_cospec.training.measure.calibrate import CHUNK, chosen
from vllm_cospec.training.measure.fixed_sequence import STRICT, threshold_sequence
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.measure.thresholds import Sweep
from vllm_cospec.training.preflight import CALIBRATION_SEED
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.pool import UnitPool
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
BOTH, TEMPERATURE = "warm start and RL", 0.7
# the best of 95 settings on 500 calibration problems, see benchmarks/results/pareto_demo.json
RULE = "relaxed_topk(top_n=10, delta=0.9)"

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """Runs that are trained alike, but for their seed; and where their arbiters are served."""

    name: str
    changes: dict[str, dict[str, Any]]  # of the configuration, by table
    served: tuple[tuple[float, int], ...]  # temperature, K


def kinds_of(config: TrainConfig) -> tuple[Kind, ...]:
    """Return what is trained for a configuration."""
    k = config.pair.num_speculative_tokens
    fewer = min(4, k - 2)
    return (
        Kind(BOTH, {}, ((0.0, k), (TEMPERATURE, k))),
        Kind("RL alone", {"learner": {"warm_start_iterations": 0}}, ((0.0, k),)),
        Kind("trained at T = 0.7", {"rollout": {"temperature": TEMPERATURE}}, ((TEMPERATURE, k), (0.0, k))),
        Kind(f"trained with K = {fewer}", {"pair": {"num_speculative_tokens": fewer}}, ((0.0, k), (0.0, fewer))),
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


def train(config: TrainConfig, output: Path, engines: Engines) -> Weights | None:
    """Train a run, or go on with it; returns the weights of the arbiter that would ship, None without such engines."""
    kept = output / "arbiter.safetensors"
    if not kept.is_file():
        if not engines.draft(config.pair.num_speculative_tokens):
            return None
        trainer = LabelKeeper(config, output, resume=output.is_dir(), say=notice)
        engines.train(trainer)
        notice(f"{time.strftime('%H:%M:%S')} trained: {output}")
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
class Questions:
    """What everything is measured on."""

    calibration: list[Problem]
    test: list[Problem]


def judged(
    pool: UnitPool, name: str, weights: Weights, problems: list[Problem], thresholds: tuple[float, ...],
    temperature: float,
) -> Sweep:  # fmt: skip
    """Answer problems at thresholds."""
    pieces = [
        Piece(i, tuple(problems[first : first + CHUNK]), thresholds, temperature, 1.0, name)
        for i, first in enumerate(range(0, len(problems), CHUNK))
    ]
    pool.submit(pieces, pool.put(weights))
    return Sweep.merge([one.sweep for done in pool.collect([p.key for p in pieces]) for one in done])


def measure(
    pool: UnitPool, row: AblationRow, weights: Weights, problems: Questions, config: TrainConfig
) -> AblationRow:
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


def rows_wanted(kind: Kind, variant: str, seed: int) -> list[AblationRow]:
    """Return where an arbiter is to be served; what is fitted to a warm start again, as the run was trained only."""
    served = kind.served if variant == kind.name else kind.served[:1]
    return [AblationRow(variant, seed, temperature, k) for temperature, k in served]


def serve(
    config: TrainConfig, engines: Engines, wanted: list[tuple[AblationRow, Weights]], problems: Questions, work: Path,
    end: float,
) -> None:  # fmt: skip
    """Measure some rows until it is ``end``, with one set of engines for each K."""
    for k in sorted({row.num_speculative_tokens for row, _ in wanted}, reverse=True):
        if not engines.draft(k) or time.monotonic() > end:
            continue
        own = changed(config, {"pair": {"num_speculative_tokens": k}})
        with engines.judging(own, wanted[0][1]) as pool:
            for row, weights in wanted:
                if row.num_speculative_tokens == k and time.monotonic() < end:
                    save_row(work, measure(pool, row, weights, problems, own))
                    notice(f"{time.strftime('%H:%M:%S')} {row.key}")


def main(
    work: Annotated[Path, typer.Option(help="Directory of what has been trained and measured.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    config: Annotated[Path, typer.Option(help="TOML file of the runs.")] = DEMO_CONFIG,
    rule: Annotated[str, typer.Option(help="The rule that did best on calibration problems.")] = RULE,
    only: Annotated[str | None, typer.Option(help="Kinds of runs, separated by semicolons; all if left out.")] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds, separated by commas.")] = "1,2,3",
    iterations: Annotated[int, typer.Option(min=2, help="Updates of each run.")] = 16,
    calibration: Annotated[int, typer.Option(min=20, help="Calibration problems.")] = 500,
    test: Annotated[int, typer.Option(min=20, help="Test problems.")] = 1000,
    test_seed: Annotated[int, typer.Option(help="Which test problems.")] = 4242,
    in_process: Annotated[
        int | None, typer.Option(help="One engine in this process, with so many draft tokens, and no Ray.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin nothing more after so long.")] = float("inf"),
) -> None:
    """Train and measure what is missing."""
    end = time.monotonic() + 60 * minutes
    base = load_train_config(config)
    k = base.pair.num_speculative_tokens
    task = load_task(base.task.name, **base.task.options)
    problems = Questions(
        task.problems(CALIBRATION_SEED, calibration, "calibration"), task.problems(test_seed, test, "test")
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    engines: Engines = OnRay() if in_process is None else OneEngine(base, in_process)
    with engines:
        for kind in chosen_kinds(base, only):
            done = {row.key for row in saved_rows(work)}
            wanted: list[tuple[AblationRow, Weights]] = []
            for seed in numbers(seeds, "--seeds"):
                run = changed(base, kind.changes, seed=seed, iterations=iterations)
                output = work / f"{kind.name.replace(' ', '-').replace('=', '')}-{seed}"
                missing = [
                    (variant, row)
                    for variant in variants(kind)
                    for row in rows_wanted(kind, variant, seed)
                    if row.key not in done
                ]
                trained = train(run, output, engines) if missing and time.monotonic() < end else None
                if trained is None:
                    continue
                wanted += [(row, weights_of(variant, run, trained, output)) for variant, row in missing]
            if kind.name == BOTH and wanted:
                strict = [AblationRow("strict", 0, t, k) for t in (0.0, TEMPERATURE)]
                wanted += [(row, wanted[0][1]) for row in strict if row.key not in done]
            serve(base, engines, wanted, problems, work, end)
        row = AblationRow(rule, 0, 0.0, k)
        if row.key not in {found.key for found in saved_rows(work)} and engines.draft(k) and time.monotonic() < end:
            save_row(work, row.with_outcome(engines.outcome(base, rule, problems.test), None))
    rows = saved_rows(work)
    if json_path is not None:
        how = f"{iterations} updates a run; {calibration} calibration and {test} test problems, seed {test_seed}"
        result = {"settings": how, "rule": rule, "config": portable(base), "rows": [row.as_json() for row in rows]}
        write_result(json_path, result)
    print(markdown(rows, rule))
    against = next((row for row in rows if row.variant == rule), None)
    for row in rows:
        if against and row.seed and (row.temperature, row.num_speculative_tokens) == (0.0, k):
            print(f"{row.key}, against {rule}: {paired(row, against)}")


def chosen_kinds(config: TrainConfig, only: str | None) -> list[Kind]:
    """Return the kinds of runs that are named, or all.

    Raises:
        ConfigError: there is no such kind.
    """
    kinds = {kind.name: kind for kind in kinds_of(config)}
    names = list(kinds) if only is None else [name.strip() for name in only.split(";")]
    for name in names:
        if name not in kinds:
            raise ConfigError(f"--only: {name!r} is none of {'; '.join(kinds)}")
    return [kinds[name] for name in names]


if __name__ == "__main__":
    run_command(main)
