"""What is saved is what is loaded, whatever happens in between."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import make_arbiter, make_config, some_statistics
from safetensors.torch import load_file, save_file

from vllm_cospec import arbiter as arbiter_module
from vllm_cospec.arbiter import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    current_schema,
    load_artefact,
    load_config,
    save_artefact,
)
from vllm_cospec.calibration import calibrated_threshold
from vllm_cospec.errors import ArtefactError
from vllm_cospec.kernels.statistics import INPUT_LIMIT


@pytest.mark.parametrize("hidden_sizes", [(1,), (32,), (32, 32), (7, 256)])
@pytest.mark.parametrize("draft_logits", [True, False])
def test_what_is_loaded_scores_bit_for_bit_as_what_was_saved(
    tmp_path: Path, hidden_sizes: tuple[int, ...], draft_logits: bool
) -> None:
    arbiter, config = make_arbiter(hidden_sizes), make_config(hidden_sizes, draft_logits)
    save_artefact(tmp_path / "new" / "arbiter", arbiter, config, "# Card\n")
    loaded, loaded_config = load_artefact(tmp_path / "new" / "arbiter")
    assert loaded_config == config == load_config(tmp_path / "new" / "arbiter")
    rows = some_statistics()
    assert torch.equal(loaded(rows), arbiter(rows))
    assert torch.equal(loaded.logit(rows), arbiter.logit(rows))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_artefact_is_three_readable_files_and_no_pickle(artefact: Path) -> None:
    assert sorted(path.name for path in artefact.iterdir()) == [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE]
    config = json.loads((artefact / CONFIG_FILE).read_text())
    assert config["format_version"] == 2
    assert config["schema"] == current_schema(True).model_dump()
    assert (artefact / CARD_FILE).read_text() == "# Card\n"
    assert load_file(artefact / WEIGHTS_FILE).keys() == make_arbiter().state_dict().keys()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_others_read_an_artefact_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_artefact(tmp_path / "arbiter", make_arbiter(), make_config(), "# Card\n")
    finally:
        os.umask(before)
    files = (tmp_path / "arbiter").iterdir()
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {
        CARD_FILE: mode, CONFIG_FILE: mode, WEIGHTS_FILE: mode,
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "arbiter").stat().st_mode) == 0o777 & ~umask


def test_the_network_standardises_and_applies_its_layers() -> None:
    arbiter = make_arbiter((5,))
    rows = some_statistics()
    state = arbiter.state_dict()
    x = ((rows - state["mean"]) / state["scale"]).clamp(-INPUT_LIMIT, INPUT_LIMIT)
    hidden = x @ state["layers.0.weight"].T + state["layers.0.bias"]
    logit = hidden.clamp(min=0) @ state["layers.1.weight"].T + state["layers.1.bias"]
    torch.testing.assert_close(arbiter.logit(rows), logit.squeeze(1), rtol=1e-4, atol=1e-3)  # logits of up to 1e3
    scores = arbiter(rows)
    assert scores.shape == (200,)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_saving_replaces_an_older_artefact_and_leaves_nothing_else(artefact: Path) -> None:
    newer = make_arbiter((16,), seed=5)
    save_artefact(artefact, newer, make_config((16,)), "# New\n")
    loaded, config = load_artefact(artefact)
    assert config.hidden_sizes == (16,)
    assert torch.equal(loaded(some_statistics()), newer(some_statistics()))
    assert (artefact / CARD_FILE).read_text() == "# New\n"
    assert list(artefact.parent.iterdir()) == [artefact]


def check_old_one_is_intact(artefact: Path) -> None:
    loaded, config = load_artefact(artefact)
    assert config == make_config()
    assert torch.equal(loaded(some_statistics()), make_arbiter()(some_statistics()))
    assert (artefact / CARD_FILE).read_text() == "# Card\n"


class Killed(BaseException):
    """Ends a save the way a signal does."""


@pytest.mark.parametrize("written", [b"", b"\x08\x00\x00\x00", None])
def test_a_save_that_dies_while_writing_leaves_the_old_artefact(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, written: bytes | None
) -> None:
    def dies(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if written is None:
            save_file(tensors, path)  # complete, and dies right after
        else:
            Path(path).write_bytes(written)
        raise Killed

    monkeypatch.setattr(arbiter_module, "save_file", dies)
    with pytest.raises(Killed):
        save_artefact(artefact, make_arbiter(seed=9), make_config(), "# New\n")
    check_old_one_is_intact(artefact)
    assert [path.name for path in artefact.parent.iterdir() if not path.name.startswith(".")] == [artefact.name]

    monkeypatch.undo()
    save_artefact(artefact, make_arbiter(seed=9), make_config(), "# New\n")  # what is left over is no obstacle
    assert torch.equal(load_artefact(artefact)[0](some_statistics()), make_arbiter(seed=9)(some_statistics()))


def test_a_save_that_dies_while_tidying_up_is_no_obstacle_to_the_next(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a container every run of a program may have the same process id, and with it the same temporary names.
    def dies(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).exists():
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(Killed):
        save_artefact(artefact, make_arbiter(seed=8), make_config(), "# New\n")
    monkeypatch.undo()
    assert torch.equal(load_artefact(artefact)[0](some_statistics()), make_arbiter(seed=8)(some_statistics()))
    save_artefact(artefact, make_arbiter(seed=9), make_config(), "# Newer\n")
    assert torch.equal(load_artefact(artefact)[0](some_statistics()), make_arbiter(seed=9)(some_statistics()))


def test_a_first_save_that_dies_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(tensors: dict[str, torch.Tensor], path: Path) -> None:
        Path(path).write_bytes(b"part")
        raise Killed

    monkeypatch.setattr(arbiter_module, "save_file", dies)
    with pytest.raises(Killed):
        save_artefact(tmp_path / "arbiter", make_arbiter(), make_config(), "# Card\n")
    assert not (tmp_path / "arbiter").exists()


def test_a_reader_sees_the_old_or_the_new_artefact_at_every_moment_of_a_save(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look after every step that moves something into or out of place."""
    looked = []

    def looking(original: Callable) -> Callable:
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            looked.append(load_artefact(artefact)[1].threshold)
            return result

        return step

    for holder, name in ((Path, "rename"), (Path, "replace"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(holder, name, looking(getattr(holder, name)))
    save_artefact(artefact, make_arbiter(seed=9), make_config(threshold=0.125), "# New\n")
    assert looked
    assert looked == sorted(looked, reverse=True)  # 0.625, the old one, and from some moment on 0.125
    assert load_artefact(artefact)[1].threshold == 0.125


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["mean", "scale", "layers.0.weight", "layers.2.bias"])
def test_weights_that_are_not_finite_are_not_saved(artefact: Path, name: str, value: float) -> None:
    diverged = make_arbiter()
    diverged.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ArtefactError, match=name):
        save_artefact(artefact, diverged, make_config(), "# New\n")
    check_old_one_is_intact(artefact)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_what_could_not_be_loaded_again_is_not_saved(artefact: Path, value: float) -> None:
    # The deviation of a statistic that never varies is 0.
    constant = make_arbiter()
    constant.scale[3] = value
    with pytest.raises(ArtefactError, match="scale"):
        save_artefact(artefact, constant, make_config(), "# New\n")
    check_old_one_is_intact(artefact)


def test_a_configuration_of_another_network_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="hidden_sizes"):
        save_artefact(tmp_path / "arbiter", make_arbiter((8,)), make_config((32,)), "# Card\n")
    assert not (tmp_path / "arbiter").exists()


def test_a_directory_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match="not an arbiter"):
        save_artefact(tmp_path, make_arbiter(), make_config(), "# Card\n")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_model_directory_is_not_replaced(tmp_path: Path) -> None:
    # Every Hugging Face model has a config.json and most a model.safetensors, too.
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}')
    (model / "model.safetensors").write_bytes(b"weights of a model")
    with pytest.raises(ArtefactError, match="not an arbiter"):
        save_artefact(model, make_arbiter(), make_config(), "# Card\n")
    assert (model / "model.safetensors").read_bytes() == b"weights of a model"


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "arbiter").write_text("a file")
    with pytest.raises(ArtefactError, match="arbiter"):
        save_artefact(tmp_path / "arbiter", make_arbiter(), make_config(), "# Card\n")
    assert (tmp_path / "arbiter").read_text() == "a file"


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "arbiter").mkdir()
    save_artefact(tmp_path / "arbiter", make_arbiter(), make_config(), "# Card\n")
    load_artefact(tmp_path / "arbiter")


@pytest.mark.parametrize("has_curve", [True, False])
def test_an_artefact_of_format_1_is_read_with_its_threshold_and_bounds_nothing(has_curve: bool, tmp_path: Path) -> None:
    directory = tmp_path / "arbiter"
    shutil.copytree(Path(__file__).parents[3] / "benchmarks" / "smollm2" / "arbiter", directory)
    config = json.loads((directory / "config.json").read_text())
    del config["statement"]
    for point in config["calibration"]:
        del point["loss_bound"]
    config |= {"format_version": 1, "calibration": config["calibration"] if has_curve else []}
    (directory / "config.json").write_text(json.dumps(config))
    _, artefact = load_artefact(directory)
    assert artefact.format_version == 1
    assert artefact.statement is None
    assert 0 < artefact.threshold < 1
    with pytest.raises(ArtefactError, match="run `cospec calibrate`"):
        calibrated_threshold(artefact.calibration, "arbiter", 0.1)
