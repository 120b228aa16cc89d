"""How much the learner makes of branches of which few are telling: a synthetic study with the real learner.

At each mismatch keeping the draft's token changes the answer with a small probability, 3 % unless told otherwise, for
better or worse as a known function of the statistics says. So the best policy is known, and what a learnt one gains is
shown as a share of what that one gains over always taking the target's token. No engine runs, and speed counts nothing.

    python benchmarks/sparse.py --json benchmarks/results/sparse.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run as run_command
from vllm_cospec.kernels.statistics import NUM_STATISTICS
from vllm_cospec.training.config import LearnerConfig
from vllm_cospec.training.learning.advantages import branch_advantages
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.rollout.episodes import Episodes

UPDATES, WARM, BRANCHES = 120, 4, 1024  # as in training/configs/qwen3.toml: 256 prompts with 4 branches each


@dataclass(frozen=True)
class Variant:
    """A way to learn."""

    config: LearnerConfig
    again: bool = False  # policy gradient: at all telling branches of the run in each update, not at new ones alone


LEARNERS = {
    "policy_gradient": Variant(LearnerConfig()),
    "policy_gradient, weight_decay = 3": Variant(LearnerConfig(weight_decay=3.0)),
    "policy_gradient of all branches": Variant(LearnerConfig(weight_decay=3.0, entropy_bonus=0.0), again=True),
    "labels": Variant(LearnerConfig(objective="labels", weight_decay=3.0, epochs=8)),
}


def worth(statistics: np.ndarray) -> np.ndarray:
    """What keeping is worth on average where it changes the answer, in -1 .. 1, [B]: the rule that is to be found."""
    x = statistics
    score = 1.2 * np.tanh(x[:, 0]) + 0.8 * x[:, 1] + 0.5 * x[:, 2] - 0.4 * np.abs(x[:, 3]) - 0.3
    return np.tanh(2 * score)


def draw(generator: np.random.Generator, count: int, telling: float) -> tuple[np.ndarray, np.ndarray]:
    """Return statistics, float32 [B, 16], and by how much the reward differs, -1, 0 or 1, [B]."""
    x = generator.standard_normal((count, NUM_STATISTICS)).astype(np.float32)
    sign = np.where(generator.random(count) < (1 + worth(x)) / 2, 1.0, -1.0)
    return x, sign * (generator.random(count) < telling)


def share_of_gain(learner: Learner) -> float:
    """Return what the policy, served at a threshold of 0.5, gains, as a share of what the best one gains."""
    x, _ = draw(np.random.default_rng(10_000), 20_000, 1.0)
    with torch.no_grad():
        kept = learner.arbiter(torch.from_numpy(x)).numpy() > 0.5
    return float((worth(x) * kept).mean() / np.maximum(worth(x), 0).mean())


def episodes(learner: Learner, x: np.ndarray, difference: np.ndarray) -> Episodes:
    """A branch at each mismatch, whose actions the learner's present policy draws."""
    with torch.no_grad():
        probability = learner.arbiter(torch.from_numpy(x)).double().numpy()
    nothing = np.zeros(len(x))
    return Episodes(
        statistics=x, probability=probability, branch_decision=np.arange(len(x)), branch_weight=np.ones(len(x)),
        branch_keep=(difference > 0) * 1.0, branch_drop=(difference < 0) * 1.0,
        branch_keep_saved=nothing, branch_drop_saved=nothing,
    )  # fmt: skip


def study(variant: Variant, seed: int, telling: float, updates: int = UPDATES) -> dict[str, float]:
    """Train once; returns the shares of the gain after the warm start and at the end, and the number of labels."""
    config = variant.config
    generator = np.random.default_rng(seed)
    learner = Learner(config, seed, updates - WARM)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    after_warm_start = 0.0
    for update in range(updates):
        x, difference = draw(generator, BRANCHES, telling)
        if not update:
            learner.normalise(x)
        seen.append((x, difference))
        statistics, differences = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        if update == WARM - 1:
            learner.warm_start(statistics, differences)
            after_warm_start = share_of_gain(learner)
        elif update >= WARM and config.objective == "labels":
            learner.fit(statistics, differences, BRANCHES)
        elif update >= WARM:
            if variant.again:  # both actions of each are known, so the present policy's gradient is exact there
                told = np.flatnonzero(differences)
                x, difference = statistics[told], differences[told]
            learner.update(branch_advantages(episodes(learner, x, difference), 0.0))
    labels = sum(int((difference != 0).sum()) for _, difference in seen)
    return {"warm_start": after_warm_start, "end": share_of_gain(learner), "labels": labels}


def main(
    telling: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the mismatches that are telling.")] = 0.03,
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds, from 1 on.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Train on synthetic branches and show which share of the achievable gain is reached."""
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, variant in LEARNERS.items():
        rows[name] = [{"seed": seed, **study(variant, seed, telling)} for seed in range(1, seeds + 1)]
        for row in rows[name]:
            print(f"{name}, seed {row['seed']}: {row['warm_start']:.2f} after the warm start, {row['end']:.2f} at the "
                  f"end, {row['labels']} labels")  # fmt: skip
    if json_path is not None:
        write_result(json_path, {"telling": telling, "updates": UPDATES, "branches": BRANCHES, "learners": rows})


if __name__ == "__main__":
    run_command(main)
