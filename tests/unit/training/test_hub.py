"""Data sets that the datasets library reads, from this machine: files, directories, and what it saved itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks import load_task

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("own_cache")
ROWS = [{"question": f"{i} plus 1?", "solution": f"so\n\\boxed{{{i + 1}}}", "level": i % 3} for i in range(80)]
KEYS = {"prompt_key": "question", "answer_key": "solution"}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_splits_columns_and_other_fields_of_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    both = {"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list(ROWS[:5])}
    datasets.DatasetDict(both).save_to_disk(path)
    task = load_task("dataset", path=str(path), test_split="validation", **KEYS)
    tests = task.problems(0, 5, "test")
    assert sorted((p.prompt, p.answer) for p in tests) == [(f"{i} plus 1?", str(i + 1)) for i in range(5)]
    assert {p.metadata["level"] for p in tests} == {0, 1, 2}
    third = next(p for p in tests if p.prompt == "2 plus 1?")
    assert third.source == f"{path}, split validation, row 3"
    assert task.score(third, "It is \\boxed{3}.") == 1.0
    assert task.score(third, "It is \\boxed{4}.") == 0.0
    trained = {p.prompt for p in task.problems(0, 50, "train")}
    assert not trained & {p.prompt for p in tests}
    with pytest.raises(ConfigError, match=r"has \d+ problems for calibration, 80 were asked for"):
        task.problems(0, 80, "calibration")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "directory", "one split"])
def test_every_form_a_data_set_may_have_here(tmp_path: Path, kind: str) -> None:
    path, rows = tmp_path / f"data.{kind}", datasets.Dataset.from_list(ROWS)
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "csv":
        rows.to_csv(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "directory":
        path.mkdir()
        rows.to_parquet(path / "train-00000-of-00001.parquet")
    else:
        rows.save_to_disk(path)
    task = load_task("dataset", path=str(path), **KEYS)
    problem = task.problems(0, 1, "train")[0]
    assert problem.prompt == f"{int(problem.answer) - 1} plus 1?"


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(saved)
    (tmp_path / "notes.txt").write_text("x")
    for options, message in (
        ({"path": str(saved), "split": "dev", **KEYS}, r"task.options: the data set .* split dev\) cannot be read"),
        ({"path": str(tmp_path / "notes.txt")}, r"task.options.path: .* is none of .parquet"),
        ({"path": "nobody/nothing"}, r"task.options: the data set 'nobody/nothing' .* cannot be read"),
        ({"path": str(saved), "prompt_key": "problem"}, r"split train, row 1: 'problem' must be a text .* the fields"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_task("dataset", **options)
