"""What an arbiter of the code pair needs, judged by labels alone: other fits, and without groups of the statistics.

Labels come from text (training/pairs/code/labels.py): at a mismatch the text proves either the draft or the target
right. They lie in a file window by window, so a part of them from one place to another has windows of its own, though
perhaps of files that other parts have windows of as well. Each part is judged by what was fitted to the others, or all
of it is fitted to and other labels judge: those of another split have files that were not seen. Each part, or seed,
draws what is learnt from anew, with replacement, and begins with other weights. Nothing is generated: how many lines a
fit completes is another question, see :mod:`benchmarks.natural`.

    python -m vllm_cospec.training.pairs.code.labels --windows 600 --output runs/train.safetensors
    python -m vllm_cospec.training.pairs.code.labels --windows 200 --split calibration --seed 2 \\
        --output runs/held.safetensors
    python -m benchmarks.label_fits --labels runs/train.safetensors --json FILE
    python -m benchmarks.label_fits --labels runs/train.safetensors --held-out runs/held.safetensors --json FILE
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.ablations import GROUPS, Weights, changed, logistic, warm_start
from benchmarks.command import run as run_command
from benchmarks.familiarity import auc
from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels.statistics import INDEX
from vllm_cospec.training.config import TrainConfig, load_train_config
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.measure.outcome import changes
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.progress import progress_bar

Labels = tuple[Tensor, Tensor]  # statistics [M, 16], and 1 or -1 for draft and target [M]

CONFIG = Path("training/configs/code.toml")
THRESHOLDS = (0.5, 0.7)
MEAN = 0.5  # the weight of mixture that was right most often on calibration lines
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
    found = {
        "auc": auc(logit.numpy(), keep.numpy()),
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
        seed: of the labels that are drawn and of the network's first weights, from 1.
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


def mean_of_both(statistics: Tensor, weight: float) -> Tensor:
    """Return what ``mixture`` decides by, [M]: how far the draft's token leads the target's in w p + (1 - w) q."""
    target = statistics[:, INDEX["target_logprob_draft"]].exp() - statistics[:, INDEX["target_logprob_top"]].exp()
    draft = statistics[:, INDEX["draft_logprob_draft"]].exp() - statistics[:, INDEX["draft_logprob_target"]].exp()
    return weight * target + (1 - weight) * draft


def unfitted(lead: Tensor, labels: Tensor) -> dict[str, float]:
    """Say how well a rule that keeps the draft where a number is at least 0 tells labels apart, see :func:`judged`."""
    kept, right = lead >= 0, labels > 0
    return {
        "auc": auc(lead.numpy(), right.numpy()), "right": float((kept == right).float().mean()),
        "gain": 100 * float((labels * kept).mean()),
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Return a result file as a table in Markdown: means of the parts or seeds, and the range of the first figure."""
    lines = [
        "| fitted to the labels | AUC (range) | loss, nats | told apart | "
        + " | ".join(f"gain at {threshold:g}" for threshold in THRESHOLDS) + " |",
        "|---|---|---|---|" + "---|" * len(THRESHOLDS),
    ]  # fmt: skip
    for name, rows in result["fits"].items():
        own = [row["auc"] for row in rows]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in FIGURES}
        gains = " | ".join(f"{mean[f'gain_{threshold:g}']:+.1f}" for threshold in THRESHOLDS)
        lines.append(
            f"| {name} | {mean['auc']:.3f} ({min(own):.3f} to {max(own):.3f}) | {mean['loss']:.3f} | "
            f"{100 * mean['right']:.1f} % | {gains} |"
        )
    for name, rows in result.get("unfitted", {}).items():
        own = [row["auc"] for row in rows]
        right, gain = (float(np.mean([row[key] for row in rows])) for key in ("right", "gain"))
        lines.append(
            f"| `{name}`, which is not fitted | {np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f}) | | "
            f"{100 * right:.1f} % | {gain:+.1f} |" + " |" * (len(THRESHOLDS) - 1)
        )
    return "\n".join(lines)


def scored(weights: Weights, hidden_sizes: Sequence[int], statistics: Tensor) -> Tensor:
    """Return the logits of an arbiter, [M]."""
    arbiter = Arbiter(tuple(hidden_sizes))
    arbiter.load_state_dict(weights)
    with torch.no_grad():
        return arbiter.logit(statistics)


def partitions(labels: Labels, held_out: Labels | None, parts: int) -> Iterator[tuple[Labels, Labels]]:
    """Yield, for each part or seed, what is learnt from and what judges."""
    count = len(labels[1])
    for part in range(parts):
        if held_out is not None:
            yield labels, held_out
            continue
        own = torch.zeros(count, dtype=torch.bool)
        own[part * count // parts : (part + 1) * count // parts] = True
        yield (labels[0][~own], labels[1][~own]), (labels[0][own], labels[1][own])


def read(path: Path) -> Labels:
    """Return statistics and labels of a file."""
    found = load_file(path)
    return found["statistics"], found["labels"]


def main(
    labels: Annotated[Path, typer.Option(help="Labels to fit to.")],
    held_out: Annotated[Path | None, typer.Option(help="Labels of other files, to judge by.")] = None,
    config: Annotated[Path, typer.Option(help="TOML file of the pair and the learner.")] = CONFIG,
    parts: Annotated[int, typer.Option(min=2, help="Parts of the labels, or seeds with --held-out.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Fit and judge, and show a table."""
    run = load_train_config(config)
    given = {"labels": labels} | ({} if held_out is None else {"held_out": held_out})
    learnt = {name: read(path) for name, path in given.items()}
    found: dict[str, list[dict[str, float]]] = {}
    rule: list[dict[str, float]] = []
    told: dict[str, list[list[Tensor]]] = {}  # whether the fit, and the rule, told each label
    with progress_bar("fitting", parts * (2 + len(GROUPS))) as tick:
        for seed, (own, judge) in enumerate(partitions(learnt["labels"], learnt.get("held_out"), parts), 1):
            lead = mean_of_both(judge[0], MEAN)
            rule.append(unfitted(lead, judge[1]))
            for name, fit in fits(run, own[0].numpy(), own[1].numpy(), seed).items():
                logit = scored(fit(), run.learner.hidden_sizes, judge[0])
                found.setdefault(name, []).append(judged(logit, judge[1]))
                told.setdefault(name, []).append([(score >= 0) == (judge[1] > 0) for score in (logit, lead)])
                tick(1, name)
    result: dict[str, Any] = {"parts": parts, "judged_by": "held_out" if held_out else "each part by the others"}
    for name, path in given.items():
        result[name] = len(learnt[name][1])
        result[f"{name}_draft_right"] = float((learnt[name][1] > 0).float().mean())
        result[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    result |= {"fits": found, "unfitted": {f"mixture(weight={MEAN:g})": rule}}
    if held_out is None:  # else each seed is judged by the same labels
        result["told_against_unfitted"] = {
            name: changes(*(torch.cat(side).numpy().astype(float) for side in zip(*own, strict=True)))
            for name, own in told.items()
        }
    print(markdown(result))
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    run_command(main)
