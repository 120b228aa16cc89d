"""What may differ between a run and its continuation, and what may not: settings, models, data, code of rewards.

Models and data are compared by what is in their files, so that they may lie elsewhere when a run goes on: in another
checkout, in a home directory that is mounted at another place.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import TrainConfig

# None of these changes the result of an update that has been taken.
FREE = {"ray_address", "iterations", "calibration"}
FREE_IN_ROLLOUT = {"actors", "cpus_per_actor", "gpus_per_actor", "unit_timeout_s", "start_timeout_s", "attempts"}
# What may differ because it is the way out of an error: a loss that is not finite, a reward that takes too long.
FREE_IN_LEARNER = {"learning_rate"}
FREE_IN_TASK = {"reward_timeout_s", "reward_memory_gb", "reward_processes", "max_failed_rewards"}
LARGE = 64 * 2**20  # of larger files the beginning, the end and the size are looked at
PART = 2**20
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
# Settings that name files, and which of a directory's are looked at.
PLACES = {
    "pair.target": MODEL_FILES,
    "pair.draft": MODEL_FILES,
    "pair.engine.tokenizer": MODEL_FILES,
    "task.options.tokenizer": MODEL_FILES,
    "learner.start": ("*.safetensors",),
    "task.options.path": ("**/*",),
    "task.options.test_path": ("**/*",),
}


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as a checkpoint keeps it."""
    return json.loads(config.model_dump_json())


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Return a hash of everything outside of the configuration that results depend on, by the setting that names it."""
    found = {}
    settings = settings_of(config)
    for name, patterns in PLACES.items():
        named = _at(settings, name)
        if isinstance(named, str) and Path(named).exists():
            found[name] = _hash(_files(Path(named), patterns))
    module, colon, _ = config.task.reward.partition(":")
    spec = importlib.util.find_spec(module) if colon else None
    if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
        found["task.reward"] = _hash([Path(spec.origin)])
    return found


def check_continuation(facts: dict[str, Any], config: TrainConfig, updates: int) -> None:
    """Refuse to continue a run with something else than it began with.

    Args:
        facts: of its last checkpoint.
        config: now.
        updates: that have been taken.

    Raises:
        ConfigError: names the first setting, or the file behind one, that differs.
    """
    before, now = facts.get("fingerprints", {}), fingerprints(config)
    moved = [name for name in PLACES if name in before and name in now]
    _same(_essential(facts["config"], moved), _essential(settings_of(config), moved), "")
    if config.iterations < updates:
        raise ConfigError(
            f"--resume: iterations is {config.iterations}, and {updates} updates have been taken; it may only be raised"
        )
    for name, own in before.items():
        if now.get(name) != own:
            raise ConfigError(
                f"--resume: what {name} names has changed since the run began; put the old files back, or start anew "
                f"in another directory"
            )


def _essential(settings: dict[str, Any], moved: list[str]) -> dict[str, Any]:
    """The settings a result depends on, without those whose files are compared."""
    settings = copy.deepcopy(settings)
    for name in moved:
        where, _, last = name.rpartition(".")
        _at(settings, where).pop(last)
    rest = {key: value for key, value in settings.items() if key not in FREE}
    for part, free in (("rollout", FREE_IN_ROLLOUT), ("learner", FREE_IN_LEARNER), ("task", FREE_IN_TASK)):
        rest[part] = {key: value for key, value in settings[part].items() if key not in free}
    return rest


def _same(old: Any, new: Any, where: str) -> None:
    """Compare settings; names the first that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            _same(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        raise ConfigError(
            f"--resume: {where} was {old!r} when the run began and is {new!r} now; set it back, or start anew in "
            f"another directory"
        )


def _at(settings: Any, name: str) -> Any:
    """The setting of a dotted name; None where there is none."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _files(place: Path, patterns: tuple[str, ...]) -> list[Path]:
    if place.is_file():
        return [place]
    return sorted({path for pattern in patterns for path in place.glob(pattern) if path.is_file()})


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= LARGE:
                digest.update(file.read())
            else:
                digest.update(file.read(PART))
                file.seek(-PART, 2)
                digest.update(file.read())
    return digest.hexdigest()
