"""Going on with what an earlier run has left, where it was begun alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_cospec.errors import ConfigError


def require_alike(found: Mapping[str, Any], about: Mapping[str, Any], holds: str, other: str) -> None:
    """Refuse to go on where something was begun otherwise.

    Args:
        found: what it was begun with.
        about: what this run is.
        holds: where it lies and what it holds, up to the name of what differs.
        other: what to choose another one of.

    Raises:
        ConfigError: names what differs.
    """
    differing = [key for key, value in about.items() if found.get(key) != value]
    if differing:
        raise ConfigError(f"{holds} {differing[0]}; choose another {other}")


def drop_cut_line(path: Path) -> None:
    """Take away what a kill has left of a last line, so that what is appended stands on lines of its own."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
