"""Hostile paths, damaged artefacts and drafts: one sentence each, before any engine process exists."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import (
    CURVE,
    LEFT_OUT,
    NAN,
    Pair,
    conditions,
    edit_json,
    refused,
    symlink_loop,
    user_config,
    write_artefact,
)
from safetensors.torch import load_file, save_file

from vllm_cospec.arbiter import current_schema


def empty_directory(place: Path) -> Path:
    (place / "empty").mkdir()
    return place / "empty"


def file(place: Path) -> Path:
    (place / "file").write_text("{}")
    return place / "file"


def fifo(place: Path) -> Path:
    os.mkfifo(place / "fifo")  # opening it would hang
    return place / "fifo"


def directory_of_devices(place: Path) -> Path:
    (place / "devices").mkdir()
    for name in ("config.json", "model.safetensors"):
        (place / "devices" / name).symlink_to("/dev/zero")  # reading it would never end
    return place / "devices"


def directory_of_directories(place: Path) -> Path:
    (place / "directories" / "config.json").mkdir(parents=True)
    return place / "directories"


def relative_directory(place: Path) -> str:
    (place / "here" / "org" / "empty").mkdir(parents=True)
    return "org/empty"


PATHS = {
    "symlink loop": symlink_loop,
    "empty directory": empty_directory,
    "file": file,
    "fifo": fifo,
    "directory of devices": directory_of_devices,
    "directory of directories": directory_of_directories,
    "relative directory that looks like a hub id": relative_directory,
    "nothing there": lambda place: place / "nothing",
    "below a file": lambda place: file(place) / "below",
    "null byte": lambda place: "a\0b",
    "null byte in an absolute path": lambda place: f"{place}/\0",
    "null byte in a hub id": lambda place: "org/name\0",
    "5000 characters": lambda place: "x" * 5000,
    "5000 characters, absolute": lambda place: "/" + "x" * 5000,
    "5000 directories": lambda place: "../" * 5000,
    "line break": lambda place: place / "a\nb",
    "lone surrogate": lambda place: "/\ud800",
    "null device": lambda place: "/dev/null",
    "zero device": lambda place: "/dev/zero",
    "root": lambda place: "/",
    "up": lambda place: "../../..",
    "here": lambda place: ".",
    "home": lambda place: "~/no-such-directory",
    "home of nobody": lambda place: "~no-such-user/arbiter",
    "url": lambda place: "https://example.invalid/model",
    "bucket": lambda place: "s3://bucket/model",
    "hub id that cannot be fetched": lambda place: "nobody/nothing",
    "malformed hub id": lambda place: "no body/no thing",
    "hub id with a line break": lambda place: "no/bo\ndy",
    "lone surrogate in a hub id": lambda place: "\ud800/x",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_hostile_path_of_the_draft_is_refused_in_one_sentence(
    pair: Pair, tmp_path: Path, path: Callable[..., Any]
) -> None:
    value = str(path(tmp_path))
    refused(pair.target, user_config(pair, model=value), "speculative_config.model", repr(value))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_hostile_path_of_the_arbiter_is_refused_in_one_sentence(
    pair: Pair, tmp_path: Path, path: Callable[..., Any]
) -> None:
    refused(
        pair.target, user_config(pair, arbiter=str(path(tmp_path))), "speculative_config.arbiter", "no arbiter here"
    )


def edit_weights(directory: Path, change: Callable[..., Any]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def poison(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["layers.0.weight"][0, 0] = NAN
    return tensors


ARTEFACTS = {
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "weights truncated": (lambda d: os.truncate(d / "model.safetensors", 200), "model.safetensors"),
    "weights empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "weights not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\x80" * 999), "model.safetensors"),
    "weights with nan": (lambda d: edit_weights(d, poison), "layers.0.weight"),
    "weights with swapped shapes": (
        lambda d: edit_weights(d, lambda t: {k: v.t().contiguous() if v.dim() == 2 else v for k, v in t.items()}),
        "layers.0.weight",
    ),
    "weights with a tensor too many": (lambda d: edit_weights(d, lambda t: t | {"more": torch.ones(1)}), "'more'"),
    "weights in half precision": (
        lambda d: edit_weights(d, lambda t: {k: v.half() for k, v in t.items()}),
        "not finite float32",
    ),
    "scale of zero": (lambda d: edit_weights(d, lambda t: t | {"scale": torch.zeros(16)}), "'scale'"),
    "config not json": (lambda d: (d / "config.json").write_text("not json\nat all"), "config.json"),
    "config binary": (lambda d: (d / "config.json").write_bytes(bytes(range(256))), "config.json"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "config nested without end": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json"),
    "config too large": (lambda d: (d / "config.json").write_text(" " * (4 * 2**20 + 1)), "config.json"),
    "config with an unknown key": (lambda d: edit_json(d / "config.json", xyzzy=1), "config.json.xyzzy"),
    "config with a long unknown key": (lambda d: edit_json(d / "config.json", **{"x\n" * 999: 1}), "config.json"),
    "config with a threshold of 2": (lambda d: edit_json(d / "config.json", threshold=2), "config.json.threshold"),
    "config of another network": (lambda d: edit_json(d / "config.json", hidden_sizes=[9]), "model.safetensors"),
    "config of a huge network": (lambda d: edit_json(d / "config.json", hidden_sizes=[10**9]), "hidden_sizes"),
    "config of another format": (lambda d: edit_json(d / "config.json", format_version=3), "format_version"),
    "config of another schema": (
        lambda d: edit_json(d / "config.json", schema=current_schema(True).model_dump() | {"hash": "0" * 16}),
        "schema",
    ),
    "other tokenizer": (lambda d: write_artefact(d, tokenizer_hash="0" * 16), "tokenizer"),
    "other kind of drafter": (lambda d: write_artefact(d, draft_logits=False), "draft logits"),
}


@pytest.mark.parametrize(("damage", "names"), ARTEFACTS.values(), ids=ARTEFACTS)
def test_a_damaged_or_foreign_artefact_is_refused_in_one_sentence(
    pair: Pair, tmp_path: Path, damage: Callable[..., Any], names: str
) -> None:
    directory = Path(shutil.copytree(pair.artefact, tmp_path / "arbiter"))
    damage(directory)
    refused(pair.target, user_config(pair, arbiter=str(directory)), names)


def test_an_artefact_trained_with_draft_logits_is_refused_for_ngram(pair: Pair) -> None:
    refused(
        pair.target,
        user_config(pair, arbiter=str(pair.artefact), draft_method="ngram", model=LEFT_OUT),
        "draft logits",
    )


NO_PROMISE: dict[str, dict[str, Any]] = {
    "no curve": {"calibration": ()},
    "no bounds": {"calibration": tuple(point.model_copy(update={"loss_bound": None}) for point in CURVE)},
    "nobody knows for what": {"calibrated_for": None},
    "another draft": {"calibrated_for": conditions()},
}


@pytest.mark.parametrize("changes", NO_PROMISE.values(), ids=NO_PROMISE)
def test_a_loss_the_artefact_cannot_promise_is_refused_in_one_sentence(
    pair: Pair, tmp_path: Path, changes: dict[str, Any]
) -> None:
    directory = write_artefact(tmp_path / "arbiter", **{"calibrated_for": conditions(pair.draft)} | changes)
    refused(pair.target, user_config(pair, arbiter=str(directory), max_accuracy_loss=0.5), "max_accuracy_loss")


DRAFTS = {
    "without config": lambda d: (d / "config.json").unlink(),
    "config truncated": lambda d: os.truncate(d / "config.json", 40),
    "config empty": lambda d: (d / "config.json").write_text(""),
    "config a list": lambda d: (d / "config.json").write_text("[]"),
    "config an empty object": lambda d: (d / "config.json").write_text("{}"),
    "config binary": lambda d: (d / "config.json").write_bytes(bytes(range(256))),
    "config of an unknown kind": lambda d: (d / "config.json").write_text('{"model_type": "xyzzy"}'),
    "config of an unknown architecture": lambda d: edit_json(d / "config.json", architectures=["Xyzzy"]),
    "config with a word for a number": lambda d: edit_json(d / "config.json", vocab_size="many"),
}


@pytest.mark.parametrize("damage", DRAFTS.values(), ids=DRAFTS)
def test_a_damaged_draft_is_refused_in_one_sentence(pair: Pair, tmp_path: Path, damage: Callable[..., Any]) -> None:
    directory = Path(shutil.copytree(pair.draft, tmp_path / "draft"))
    damage(directory)
    refused(pair.target, user_config(pair, model=str(directory)), "speculative_config.model", str(directory))


def test_a_draft_with_another_vocabulary_is_refused_in_one_sentence(pair: Pair) -> None:
    refused(pair.target, user_config(pair, model=str(pair.other_draft)), "vocabulary")
