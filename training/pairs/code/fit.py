"""Arbiters without reinforcement learning: a network or a logistic regression fitted to labels, or a run's warm start.

python -m vllm_cospec.training.pairs.code.fit --labels runs/code_labels.safetensors --output runs/code_text/arbiter
python -m vllm_cospec.training.pairs.code.fit --labels FILE --logistic --output runs/code_logistic/arbiter
python -m vllm_cospec.training.pairs.code.fit --checkpoint runs/code/checkpoints/update-000014.safetensors --output DIR
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.training.artefact import portable
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.learning.linear import linear_arbiter, logistic_regression
from vllm_cospec.training.measure.card import save_uncalibrated

CONFIG = Path("training/configs/code.toml")
HELD_OUT = 10  # one label in so many is not learnt from
PENALTY = 1e-4  # of a logistic regression, on the squared weights of standardised statistics


def fit_logistic(arbiter: Arbiter, statistics: Tensor, labels: Tensor) -> Arbiter:
    """Fit a logistic regression.

    Args:
        arbiter: whose standardisation is taken over.
        statistics: [M, 16].
        labels: [M], 1 where the draft is to be kept and -1 where it is not.
    """
    x = (statistics - arbiter.mean) / arbiter.scale
    weights, bias = logistic_regression(x, (labels > 0).float(), torch.ones(len(x)), PENALTY)
    fitted = linear_arbiter(weights, bias, arbiter.hidden_sizes)
    fitted.mean.copy_(arbiter.mean)
    fitted.scale.copy_(arbiter.scale)
    return fitted


@torch.no_grad()
def quality(arbiter: Arbiter, statistics: Tensor, labels: Tensor) -> dict[str, float]:
    """Return how well labels are told apart: loss in nats, share that is right at 0.5, and of always the target."""
    logit = arbiter.logit(statistics)
    return {
        "labels": float(len(labels)),
        "loss": binary_cross_entropy_with_logits(logit, (labels > 0).float()).item(),
        "right": float(((logit > 0) == (labels > 0)).float().mean()),
        "always_target": float((labels < 0).float().mean()),
    }


def main(
    output: Annotated[Path, typer.Option(help="Directory for the arbiter.")],
    labels: Annotated[Path | None, typer.Option(help="File of statistics and labels.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint of a training run, taken as it is.")] = None,
    logistic: Annotated[bool, typer.Option("--logistic", help="A logistic regression instead of a network.")] = False,
    config: Annotated[Path, typer.Option(help="TOML file of the pair and the learner.")] = CONFIG,
) -> None:
    """Write an arbiter that reinforcement learning had no part in."""
    if (labels is None) == (checkpoint is None):
        raise ConfigError("--labels: pass either labels or a --checkpoint")
    run = load_train_config(config)
    results: dict[str, float] = {}
    if checkpoint is not None:
        tensors = load_file(checkpoint)
        arbiter = Arbiter(tuple(run.learner.hidden_sizes))
        arbiter.load_state_dict({k.removeprefix("arbiter."): v for k, v in tensors.items() if k.startswith("arbiter.")})
    else:
        assert labels is not None
        found = load_file(labels)
        statistics, signs = found["statistics"], found["labels"]
        held_out = torch.arange(len(signs)) % HELD_OUT == 0
        learner = Learner(run.learner, run.seed, 1)
        learner.normalise(statistics[~held_out].numpy())
        if logistic:
            arbiter = fit_logistic(learner.arbiter, statistics[~held_out], signs[~held_out])
        else:
            learner.warm_start(statistics[~held_out].numpy(), signs[~held_out].double().numpy())
            arbiter = learner.arbiter
        results = quality(arbiter, statistics[held_out], signs[held_out])
        print(json.dumps(results))
    save_uncalibrated(output, arbiter, run.pair, portable(run), {"fit": results})


if __name__ == "__main__":
    try:
        typer.run(main)
    except CoSpecError as error:
        raise SystemExit(f"fit: {error}") from None
