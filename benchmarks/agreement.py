"""How often the arbiter chooses the branch that turns out better: agreement with an oracle, on held-out mismatches.

Every mismatch of every response is decided both ways, and both continuations run to their end under the arbiter. Only
mismatches whose two answers differ say who was right; the oracle is the one that knows the outcome.

    python benchmarks/agreement.py --artefact vllm_cospec/demo/arbiter --json benchmarks/results/agreement_demo.json
    python benchmarks/agreement.py --artefact benchmarks/code/arbiter --config training/configs/code.toml \\
        --threshold 0.7 --split calibration --problems 200
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import typer
from rich.console import Console

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run as run_command
from vllm_cospec.arbiter import load_artefact
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import TrainConfig, load_train_config
from vllm_cospec.training.measure.intervals import accuracy_interval
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.rollout.actors import RolloutActor
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.in_process import rollouts, training_engine
from vllm_cospec.training.rollout.placement import Placed
from vllm_cospec.training.rollout.pool import Pool, UnitPool
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import Split, load_task

EVERY = 1000  # branches per response: more than there are mismatches
CHUNK = 125


def figures(episodes: Episodes) -> dict[str, Any]:
    """Return how often the better branch was chosen, and what choosing it would be worth.

    ``best_first``: accuracy if the first mismatch of each response were decided by its outcome, and the others by the
    arbiter. ``best_one``: if any one were, whichever helps.
    """
    difference = episodes.difference()
    telling = difference != 0
    chose_better = (episodes.kept[episodes.branch_decision] == (difference > 0))[telling]
    n, right = int(telling.sum()), int(chose_better.sum())
    first, one = episodes.reward.astype(float), episodes.reward.astype(float)
    better = np.maximum(episodes.branch_keep, episodes.branch_drop)
    of_episode = episodes.episode[episodes.branch_decision]
    np.maximum.at(one, of_episode, better)
    _, earliest = np.unique(episodes.episode, return_index=True)  # decisions lie in the order of their responses
    at_first = np.isin(episodes.branch_decision, earliest)
    first[of_episode[at_first]] = better[at_first]
    return {
        "num_problems": len(episodes.reward),
        "num_mismatches": len(episodes.kept),
        "num_branched": len(difference),
        "num_telling": n,
        "agreement": right / max(1, n),
        "agreement_ci95": list(accuracy_interval(chose_better.astype(float))),
        "always_target": float((difference[telling] < 0).mean()),
        "keep_was_better": float((difference > 0).mean()),
        "keep_was_worse": float((difference < 0).mean()),
        "accuracy": float(np.mean(episodes.reward)),
        "best_first": float(first.mean()),
        "best_one": float(one.mean()),
    }


@contextlib.contextmanager
def engines(config: TrainConfig, weights: dict[str, Any], in_process: bool, units: int) -> Iterator[UnitPool]:
    """Have engines that roll out: on Ray, or one in this process."""
    if in_process:
        with training_engine(config, weights) as (engine, graders):
            yield rollouts(engine, graders, config)
        return
    actor = Placed(RolloutActor, config.pair, config.rollout)
    with (
        engines_session(config),
        Pool(lambda: actor.remote(config, weights), min(config.rollout.actors, units)) as pool,
    ):
        yield pool


def main(
    artefact: Annotated[Path, typer.Option(help="Directory of the trained arbiter.")],
    config: Annotated[Path, typer.Option(help="TOML file of the pair and the task.")] = DEMO_CONFIG,
    problems: Annotated[int, typer.Option(min=1, help="How many problems.")] = 2000,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 2026,
    split: Annotated[str, typer.Option(help="calibration or test.")] = "test",
    threshold: Annotated[float | None, typer.Option(help="Instead of the artefact's own.")] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="With one engine in this process, no Ray.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure the agreement."""
    if split not in get_args(Split):
        raise ConfigError(f"--split: {split!r} is none of {', '.join(get_args(Split))}")
    run = load_train_config(config)
    arbiter, made = load_artefact(artefact)
    rollout = run.rollout.model_copy(update={"branches_per_response": EVERY, "responses_per_prompt": 1})
    learner = run.learner.model_copy(update={"advantage": "branch", "hidden_sizes": made.hidden_sizes})
    run = run.model_copy(update={"rollout": rollout, "learner": learner})
    test = load_task(run.task.name, **run.task.options).problems(seed, problems, cast(Split, split))
    limit = made.threshold if threshold is None else threshold
    units = [
        Unit(0, i, tuple(test[first : first + CHUNK]), first, seed, limit)
        for i, first in enumerate(range(0, problems, CHUNK))
    ]
    with (
        engines(run, arbiter.state_dict(), in_process, len(units)) as pool,
        progress_bar("branching", problems) as tick,
    ):
        pool.submit(units, arbiter.state_dict())
        parts = pool.collect([u.key for u in units], tick=lambda parts: tick(sum(len(p.problem) for p in parts)))
    found = figures(Episodes.merge([episode for part in parts for episode in part]))
    result: dict[str, Any] = {"split": split, "seed": seed, "threshold": limit, **found}
    low, high = result["agreement_ci95"]
    Console().print(
        f"{100 * result['agreement']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) agreement with the oracle on "
        f"{result['num_telling']} of {result['num_branched']} mismatches whose two answers differ; always the target: "
        f"{100 * result['always_target']:.1f} %"
    )
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    run_command(main)
