"""How often the arbiter chooses the branch that turns out better: agreement with an oracle, on held-out mismatches.

Every mismatch of every response is decided both ways, and both continuations run to their end under the arbiter. Only
mismatches whose two answers differ say who was right; the oracle is the one that knows the outcome.

    python benchmarks/agreement.py --artefact vllm_cospec/demo/arbiter --json benchmarks/results/agreement_demo.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run as run_command
from vllm_cospec.arbiter import load_artefact
from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.measure.intervals import accuracy_interval
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.rollout.actors import RolloutActor, remote
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import load_task

EVERY = 1000  # branches per response: more than there are mismatches
CHUNK = 125


def main(
    artefact: Annotated[Path, typer.Option(help="Directory of the trained arbiter.")],
    config: Annotated[Path, typer.Option(help="TOML file of the pair and the task.")] = DEMO_CONFIG,
    problems: Annotated[int, typer.Option(min=1, help="Test problems.")] = 2000,
    seed: Annotated[int, typer.Option(help="Which test problems.")] = 2026,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure the agreement."""
    run = load_train_config(config)
    arbiter, made = load_artefact(artefact)
    rollout = run.rollout.model_copy(update={"branches_per_response": EVERY, "responses_per_prompt": 1})
    learner = run.learner.model_copy(update={"advantage": "branch", "hidden_sizes": made.hidden_sizes})
    run = run.model_copy(update={"rollout": rollout, "learner": learner})
    test = load_task(run.task.name, **run.task.options).problems(seed, problems, "test")
    units = [
        Unit(0, i, tuple(test[first : first + CHUNK]), first, seed, made.threshold)
        for i, first in enumerate(range(0, problems, CHUNK))
    ]
    weights = arbiter.state_dict()
    actor = remote(RolloutActor, rollout.cpus_per_actor, rollout.gpus_per_actor)
    with (
        engines_session(run),
        Pool(lambda: actor.remote(run, weights), min(rollout.actors, len(units))) as pool,
        progress_bar("branching", problems) as tick,
    ):
        pool.submit(units, weights)
        parts = pool.collect([u.key for u in units], tick=lambda parts: tick(sum(len(p.problem) for p in parts)))
    episodes = Episodes.merge([episode for part in parts for episode in part])
    difference = episodes.difference()
    telling = difference != 0
    chose_better = (episodes.kept[episodes.branch_decision] == (difference > 0))[telling]
    n, right = int(telling.sum()), int(chose_better.sum())
    low, high = accuracy_interval(chose_better.astype(float))
    result: dict[str, Any] = {
        "num_problems": problems,
        "num_mismatches": len(episodes.kept),
        "num_branched": len(difference),
        "num_telling": n,
        "agreement": right / max(1, n),
        "agreement_ci95": [low, high],
        "always_target": float((difference[telling] < 0).mean()),
        "keep_was_better": float((difference > 0).mean()),
        "keep_was_worse": float((difference < 0).mean()),
        "accuracy": float(np.mean(episodes.reward)),
    }
    Console().print(
        f"{100 * result['agreement']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) agreement with the oracle on {n} of "
        f"{len(difference)} mismatches whose two answers differ; always the target: "
        f"{100 * result['always_target']:.1f} %"
    )
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    run_command(main)
