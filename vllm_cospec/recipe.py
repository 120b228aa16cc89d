"""The recipe: ``cospec.json`` beside the target, and where the models and arbiters it names lie, here or on the hub."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cospec.config import WHERE
from vllm_cospec.errors import ConfigError, reason
from vllm_cospec.kernels.policies import policy_names

RECIPE_FILE = "cospec.json"
MAX_RECIPE_BYTES = 2**20


@dataclass(frozen=True)
class Hub:
    """How vLLM was told to reach the hub."""

    revision: str | None = None
    """Of the target, and so of the recipe and what lies beside it."""
    cache_dir: str | None = None
    """vLLM's ``download_dir``; None: the hub client's own."""
    token: bool | str | None = None

    def snapshot(self, repository: str, files: list[str], revision: str | None) -> Path:
        """Fetch files of a repository, given by patterns; returns its local directory. Raises the client's errors."""
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=files, cache_dir=self.cache_dir, token=self.token
            )
        )


def looks_local(path: str) -> bool:
    """Return whether a reference to a model can only be a path, not a hub id."""
    return path.startswith(("/", "./", "../", "~")) or "\0" in path or path.count("/") != 1


def is_file(path: Path) -> bool:
    """Return whether a file is there; a path that cannot be looked at is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, null bytes, a loop of links
        return False


def load_recipe(target: str, hub: Hub) -> tuple[dict[str, Any], Path | None]:
    """Read the recipe that lies beside the target.

    Returns:
        Its keys, with paths made absolute, and the file; empty and None when there is none.

    Raises:
        ConfigError: it is no JSON object, or a downloaded one points out of its repository.
    """
    path, local = _find_beside(target, RECIPE_FILE, hub)
    if path is None:
        return {}, None
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; this is no recipe")
        recipe = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not readable as JSON ({error}); mend it, or pass every key explicitly") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got {type(recipe).__name__}")
    recipe.pop("method", None)

    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or "\0" in value:
            return value
        if not local and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ConfigError(f"{path}: {value!r} leaves the repository; a downloaded recipe may not do that")
        beside = path.parent / value
        if not local:  # so far only the recipe has been downloaded
            inside = os.path.normpath(value)
            with contextlib.suppress(Exception):  # no such folder there: a hub id
                beside = hub.snapshot(target, [f"{inside}/*"], hub.revision) / inside
        return os.path.abspath(beside) if value.startswith(".") or _is_directory(beside) else value

    if "model" in recipe:
        recipe["model"] = absolute(recipe["model"])
    arbiter = recipe.get("arbiter")
    if isinstance(arbiter, dict) and "artefact" in arbiter:
        recipe["arbiter"] = {**arbiter, "artefact": absolute(arbiter["artefact"])}
    elif arbiter is not None:
        recipe["arbiter"] = absolute(arbiter)
    return recipe, path


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _find_beside(target: str, name: str, hub: Hub) -> tuple[Path | None, bool]:
    """Return the file ``name`` of a model directory or repository, and whether it is a local directory."""
    if _is_directory(Path(target)):
        path = Path(target) / name
        return (path if is_file(path) else None), True
    if looks_local(target):
        return None, True
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = hf_hub_download(target, name, revision=hub.revision, cache_dir=hub.cache_dir, token=hub.token)
        return Path(found), False
    except (HfHubHTTPError, OSError, ValueError):  # not there, offline, or not a repository: no recipe
        return None, False


def locate_artefact(reference: str, hub: Hub = Hub()) -> Path:
    """Return the local directory of an arbiter given by path, hub id or ``hub-id@revision``.

    Raises:
        ConfigError: nothing there.
    """
    if not reference:
        raise ConfigError(f"{WHERE}.arbiter: empty; pass an artefact's directory or hub id")
    path = Path(os.path.expanduser(reference))
    if _is_directory(path):
        return path.resolve()
    repository, _, revision = reference.partition("@")
    if looks_local(repository) or is_file(path):
        known = ", ".join(policy_names())
        hint = f'; for a rule write {{"policy": {reference!r}}}' if reference in known else ""
        raise ConfigError(
            f"{WHERE}.arbiter: no directory at {reference!r}{hint}; pass an artefact's directory or hub id"
        )
    try:
        return hub.snapshot(repository, ["config.json", "model.safetensors", "README.md"], revision or None)
    except Exception as error:  # the hub client raises many unrelated types; all mean the same to a user
        raise ConfigError(
            f"{WHERE}.arbiter: {reference!r} is neither a directory nor a hub id that can be fetched "
            f"({reason(error, 200)})"
        ) from None
