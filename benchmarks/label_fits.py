"""What an arbiter of the code pair needs, judged by labels alone: other fits, and without groups of the statistics.

Labels come from text (training/pairs/code/labels.py): at a mismatch the text proves either the draft or the target
right. Arbiters are fitted to those of the train split and judged by those of the calibration split, whose files they
have not seen. Each seed draws the labels that are learnt from anew, with replacement, and begins with other weights.
Nothing is generated: how many lines a fit completes is another question, see :mod:`benchmarks.natural`.

    python -m vllm_cospec.training.pairs.code.labels --windows 600 --output runs/train.safetensors
    python -m vllm_cospec.training.pairs.code.labels --windows 200 --split calibration --seed 2 \\
        --output runs/held.safetensors
    python -m benchmarks.label_fits --labels runs/train.safetensors --held-out runs/held.safetensors --json FILE
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.ablations import GROUPS, Weights, changed, logistic, warm_start
from benchmarks.command import run as run_command
from vllm_cospec.arbiter import Arbiter
from vllm_cospec.training.config import TrainConfig, load_train_config
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.progress import progress_bar

CONFIG = Path("training/configs/code.toml")
THRESHOLDS = (0.5, 0.7)
FIGURES = ("auc", "loss", "right", *(f"gain_{threshold:g}" for threshold in THRESHOLDS))


@torch.no_grad()
def judged(logit: Tensor, labels: Tensor) -> dict[str, float]:
    """Say how well scores tell labels apart.

    Args:
        logit: of keeping the draft, [M].
        labels: [M], 1 where the draft is right and -1 where the target is.

    Returns:
        ``auc``: chance that a draft that is right scores higher than one that is wrong. ``loss`` in nats. ``right``:
        share that is told apart at 0.5. ``gain_T``: right tokens won less right tokens lost for a hundred mismatches,
        against always taking the target, at threshold T.
    """
    keep = labels > 0
    score = torch.sigmoid(logit)
    higher = mannwhitneyu(logit[keep].numpy(), logit[~keep].numpy()).statistic
    found = {
        "auc": float(higher) / (int(keep.sum()) * int((~keep).sum())),
        "loss": binary_cross_entropy_with_logits(logit, keep.float()).item(),
        "right": float(((score > 0.5) == keep).float().mean()),
    }
    for threshold in THRESHOLDS:
        found[f"gain_{threshold:g}"] = 100 * float((labels * (score > threshold)).mean())
    return found


def fits(
    config: TrainConfig, statistics: np.ndarray, labels: np.ndarray, seed: int
) -> dict[str, Callable[[], Weights]]:
    """Return what is fitted, by name.

    Args:
        config: of the pair; its learner is used.
        statistics: [M, 16].
        labels: [M], 1 or -1.
        seed: of the labels that are drawn and of the network's first weights.
    """
    own = changed(config, {}, seed=seed)
    drawn = np.random.default_rng(seed).integers(0, len(labels), len(labels))
    x, worth = statistics[drawn], labels[drawn].astype(np.float64)
    learner = Learner(own.learner, seed, 1)
    learner.normalise(x)
    given = learner.weights()
    found: dict[str, Callable[[], Weights]] = {
        "network on all statistics": lambda: warm_start(own, given, x, worth),
        "logistic regression": lambda: logistic(own, given, x, worth),
    }
    for group, names in GROUPS.items():
        found[f"network without {group}"] = lambda names=names: warm_start(own, given, x, worth, without=names)  # type: ignore[misc]
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return a result file as a table in Markdown: the mean of the seeds, and the range of the first figure."""
    lines = [
        "| fitted to the labels | AUC (range of the seeds) | loss, nats | told apart | "
        + " | ".join(f"gain at {threshold:g}" for threshold in THRESHOLDS) + " |",
        "|---|---|---|---|" + "---|" * len(THRESHOLDS),
    ]  # fmt: skip
    for name, rows in result["fits"].items():
        auc = [row["auc"] for row in rows]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in FIGURES}
        gains = " | ".join(f"{mean[f'gain_{threshold:g}']:+.1f}" for threshold in THRESHOLDS)
        lines.append(
            f"| {name} | {mean['auc']:.3f} ({min(auc):.3f} to {max(auc):.3f}) | {mean['loss']:.3f} | "
            f"{100 * mean['right']:.1f} % | {gains} |"
        )
    return "\n".join(lines)


def scored(weights: Weights, hidden_sizes: Sequence[int], statistics: Tensor) -> Tensor:
    """Return the logits of an arbiter, [M]."""
    arbiter = Arbiter(tuple(hidden_sizes))
    arbiter.load_state_dict(weights)
    with torch.no_grad():
        return arbiter.logit(statistics)


def main(
    labels: Annotated[Path, typer.Option(help="Labels to fit to.")],
    held_out: Annotated[Path, typer.Option(help="Labels of other files, to judge by.")],
    config: Annotated[Path, typer.Option(help="TOML file of the pair and the learner.")] = CONFIG,
    seeds: Annotated[int, typer.Option(min=1, help="From 1 on.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Fit and judge, and show a table."""
    run = load_train_config(config)
    learnt, judge = load_file(labels), load_file(held_out)
    found: dict[str, list[dict[str, float]]] = {}
    with progress_bar("fitting", seeds * (2 + len(GROUPS))) as tick:
        for seed in range(1, seeds + 1):
            for name, fit in fits(run, learnt["statistics"].numpy(), learnt["labels"].numpy(), seed).items():
                logit = scored(fit(), run.learner.hidden_sizes, judge["statistics"])
                found.setdefault(name, []).append(judged(logit, judge["labels"]))
                tick(1, name)
    result: dict[str, Any] = {
        "labels": len(learnt["labels"]),
        "labels_sha256": hashlib.sha256(labels.read_bytes()).hexdigest(),
        "held_out": len(judge["labels"]),
        "held_out_sha256": hashlib.sha256(held_out.read_bytes()).hexdigest(),
        "held_out_draft_right": float((judge["labels"] > 0).float().mean()),
        "fits": found,
    }
    print(markdown(result))
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    run_command(main)
