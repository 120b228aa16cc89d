"""Checkpoints of a run: one safetensors file per update, written atomically; the last two are kept."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_cospec.atomic import new_file
from vllm_cospec.errors import ConfigError, TrainingError

KEPT = 2
_NAME = re.compile(r"update-(\d{6})\.safetensors")


@dataclass
class Checkpoint:
    """Where a run stands after some number of updates."""

    updates: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # JSON: the configuration, what has been counted, what was set aside


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Raises:
        TrainingError: the disk is full or not writable; older checkpoints are intact.
    """
    path = directory / f"update-{checkpoint.updates:06d}.safetensors"
    try:
        with new_file(path) as partial:
            save_file(checkpoint.tensors, partial, metadata={"facts": json.dumps(checkpoint.facts)})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be written ({error}); free space and continue with --resume") from None
    for _, older in _list(directory)[:-KEPT]:
        older.unlink(missing_ok=True)


def load_latest(directory: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint; None when there is none.

    Raises:
        ConfigError: there are checkpoints, and none can be read.
    """
    found = _list(directory)
    reason = ""
    for updates, path in reversed(found):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Checkpoint(updates, tensors, json.loads(file.metadata()["facts"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = f"{path}: {error}"
    if found:
        raise ConfigError(f"--resume: no checkpoint can be read ({reason}); start anew in another directory")
    return None


def _list(directory: Path) -> list[tuple[int, Path]]:
    """Return (updates, path) of the checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)
