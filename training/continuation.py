"""What may differ between a run and its continuation, and what may not: settings, models, data, code of rewards."""

from __future__ import annotations

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


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as a checkpoint keeps it."""
    return json.loads(config.model_dump_json())


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Return a hash of everything outside of the configuration that results depend on, by the setting that names it."""
    found = {}
    for role in ("target", "draft"):
        model = getattr(config.pair, role)
        if model is not None and Path(model).is_dir():
            files = sorted({path for pattern in MODEL_FILES for path in Path(model).glob(pattern)})
            found[f"pair.{role}"] = _hash(files)
    if config.learner.start is not None and Path(config.learner.start).is_dir():
        found["learner.start"] = _hash(sorted(Path(config.learner.start).glob("*.safetensors")))
    for name in ("path", "test_path"):
        path = config.task.options.get(name)
        if isinstance(path, str) and Path(path).exists():
            files = [Path(path)] if Path(path).is_file() else sorted(p for p in Path(path).rglob("*") if p.is_file())
            found[f"task.options.{name}"] = _hash(files)
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
    _same(_essential(facts["config"]), _essential(settings_of(config)), "")
    if config.iterations < updates:
        raise ConfigError(
            f"--resume: iterations is {config.iterations}, and {updates} updates have been taken; it may only be raised"
        )
    now = fingerprints(config)
    for name, before in facts.get("fingerprints", {}).items():
        if now.get(name) != before:
            raise ConfigError(
                f"--resume: what {name} names has changed since the run began; put the old files back, or start anew "
                f"in another directory"
            )


def _essential(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings a result depends on."""
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
