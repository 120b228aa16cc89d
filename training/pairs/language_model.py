"""The one loop in which the models of the small pairs are trained: next tokens, AdamW, a cosine for each stretch.

Everything is seeded, and a batch depends on the number of its step alone: a run that was stopped continues from its
last checkpoint with the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from vllm_cospec.atomic import new_file

IGNORE = -100  # the label torch's cross entropy leaves out
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Stretch:
    """A part of a training with its own lessons and its own cosine."""

    steps: int
    learning_rate: float  # at its peak
    lessons: Callable[[], tuple[Tensor, Tensor]]  # draws ids and labels, int64 [count, longest] each
    horizon: int | None = None  # steps the cosine is laid out for, when the stretch ends before it does


def cosine(step: int, total: int, warm_up: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def next_token_logits(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Map ids, int64 [B, T], to logits, [B, T, V]."""
    return model(input_ids=inputs, use_cache=False).logits


def train(
    name: str,
    model: PreTrainedModel,
    stretches: Sequence[Stretch],
    batch_size: int,
    seed: int,
    checkpoint: Path,
    resume: bool,
    checkpoint_every: int,
    pad: int | None = None,
    logits_of: Callable[[PreTrainedModel, Tensor], Tensor] = next_token_logits,
) -> None:
    """Train ``model`` in place and leave it in evaluation mode.

    Args:
        name: shown beside the bar.
        model: to be trained, seeded by its maker.
        stretches: one after the other.
        batch_size: rows a step.
        seed: of the batches.
        checkpoint: file for weights and optimiser, written every ``checkpoint_every`` steps and at the end.
        resume: continue from that file if it is there.
        checkpoint_every: steps.
        pad: id of the padding; batches are cut to their longest row. None: rows are about as long, nothing is cut.
        logits_of: maps (model, ids [B, T]) to logits [B, T, V].
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    done = load_checkpoint(checkpoint, model, optimizer) if resume and checkpoint.exists() else 0
    total = sum(stretch.steps for stretch in stretches)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )  # fmt: skip
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=total, completed=done, loss=float("nan"))
        start = 0
        for stretch in stretches:
            if done < start + stretch.steps:
                ids, labels = stretch.lessons()
            for step in range(max(start, done), start + stretch.steps):
                for group in optimizer.param_groups:
                    group["lr"] = stretch.learning_rate * cosine(step - start, stretch.horizon or stretch.steps)
                generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
                rows = torch.randint(len(ids), (batch_size,), generator=generator)
                longest = ids.shape[1] if pad is None else int((ids[rows] != pad).sum(1).max())
                loss = _take_step(model, optimizer, ids[rows, :longest], labels[rows, :longest], logits_of)
                progress.update(bar, completed=step + 1, loss=loss)
                if (step + 1) % checkpoint_every == 0 or step + 1 == total:
                    save_checkpoint(checkpoint, model, optimizer, step + 1)
                    print(f"{name} step {step + 1}/{total} loss {loss:.4f}", flush=True)
            start += stretch.steps
    model.eval()


def _take_step(
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    ids: Tensor,
    labels: Tensor,
    logits_of: Callable[[PreTrainedModel, Tensor], Tensor],
) -> float:
    logits = logits_of(model, ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def save_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, step: int) -> None:
    """Write weights and optimiser moments to one safetensors file, atomically."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            tensors[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key]
    with new_file(path) as partial:
        save_file(tensors, partial, metadata={"step": str(step)})


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> int:
    """Restore what :func:`save_checkpoint` wrote; returns the number of finished steps."""
    with safe_open(path, "pt") as file:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"model.{name}"))
            optimizer.state[parameter] = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in MOMENTS}
        return int(file.metadata()["step"])
