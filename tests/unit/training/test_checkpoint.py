"""Checkpoints survive what happens to files."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest
import torch

from vllm_cospec.errors import ConfigError, TrainingError
from vllm_cospec.training.learning.checkpoint import Checkpoint, load_latest, save_checkpoint


def checkpoint(updates: int) -> Checkpoint:
    return Checkpoint(updates, {"weights": torch.full((5,), float(updates))}, {"totals": {"responses": updates}})


def test_what_is_saved_comes_back_and_only_the_last_two_are_kept(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") is None
    for updates in (1, 2, 3, 10):
        save_checkpoint(tmp_path, checkpoint(updates))
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.updates, found.facts) == (10, {"totals": {"responses": 10}})
    assert torch.equal(found.tensors["weights"], torch.full((5,), 10.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "update-000003.safetensors",
        "update-000010.safetensors",
    ]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_read_a_checkpoint_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path, checkpoint(1))
    finally:
        os.umask(before)
    (saved,) = tmp_path.iterdir()
    assert stat.S_IMODE(saved.stat().st_mode) == mode


@pytest.mark.parametrize("damage", [b"", b"\x00" * 20, None])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: bytes | None) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    path = tmp_path / "update-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.updates == 1
    (tmp_path / "update-000001.safetensors").write_bytes(b"{")
    with pytest.raises(ConfigError, match="--resume: no checkpoint can be read"):
        load_latest(tmp_path)


def saves_and_fails(directory: Path, reason: str) -> None:
    with pytest.raises(TrainingError, match=rf"{reason}.*; free space and continue with --resume"):
        save_checkpoint(directory, checkpoint(2))
    found = load_latest(directory)
    assert found is not None
    assert found.updates == 1
    assert len(list(directory.iterdir())) == 1


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    saves_and_fails(tmp_path, "No space left on device")


def test_a_write_that_fails_half_way_is_named_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """With a limit on the size of files the operating system itself refuses the write, as it does on a full disk."""
    save_checkpoint(tmp_path, checkpoint(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        saves_and_fails(tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
