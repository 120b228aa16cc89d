"""Hashes that tell whether two things are the same, without reading gigabytes: a draft's weights, a chat template."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
SAMPLE = 4096  # bytes, at places spread over a file
SAMPLES = 256


def digest(*parts: Any) -> str:
    """Return 16 hex digits over values that JSON can hold, or bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        whole.update(b"\0")
    return whole.hexdigest()[:16]


def weights_hash(model: str | None, revision: str | None = None, cache_dir: str | None = None) -> str:
    """Return 16 hex digits over a model's weights: names, sizes, heads and evenly spread samples of its files.

    Training changes every tensor, so samples tell models apart; a change made by hand to a few numbers may be missed.

    Args:
        model: directory, or hub id that has been downloaded; None for a drafter without a model.
        revision, cache_dir: of a hub id.

    Returns:
        An empty string where there are no weights, or they cannot be found here.
    """
    directory = None if model is None else _directory(model, revision, cache_dir)
    if directory is None:
        return ""
    for pattern in WEIGHTS:
        files = sorted(directory.glob(pattern))
        if files:
            return digest(*(part for file in files for part in (file.name, file.stat().st_size, *_samples(file))))
    return ""


def template_hash(template: Any) -> str:
    """Return 16 hex digits over a tokenizer's chat template, or templates by name; empty where there is none."""
    return digest(template) if template else ""


def _samples(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    if size == 0:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if size <= SAMPLE * SAMPLES:
            yield content[:]
            return
        for i in range(SAMPLES):
            first = (size - SAMPLE) * i // (SAMPLES - 1)
            yield content[first : first + SAMPLE]


def _directory(model: str, revision: str | None, cache_dir: str | None) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except Exception:  # not a hub id, or not on this machine: the client raises many types
        return None
