"""What a person sees of a run."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import rich.jupyter
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vllm_cospec.training.measure.report import TENSORBOARD, Report, plot_learning, read_log
from vllm_cospec.training.progress import progress_bar

METRICS = {
    "accuracy": 0.625, "acceptance_length": 5.25, "override_rate": 0.31, "loss": -0.0123, "rollouts_per_s": 87.4,
    "entropy": 0.4, "keep_was_better": math.nan,
}  # fmt: skip


def run(output: Path, first: int, last: int, updates: int = 5) -> str:
    """Report updates first to last - 1; returns what was shown."""
    shown = io.StringIO()
    with Report(output, updates, first, Console(file=shown, width=200)) as report:
        report.progress(64)
        for iteration in range(first, last):
            report.update(iteration, METRICS | {"accuracy": iteration / 10})
    return shown.getvalue()


def test_each_update_is_shown_with_its_figures(tmp_path: Path) -> None:
    shown = run(tmp_path, 0, 2)
    assert (
        "update 2/5  accuracy 0.100  acceptance length 5.25  override rate 0.31  loss -0.0123  87 rollouts/s" in shown
    )
    assert "2/5" in shown.splitlines()[-1]  # the bar


def test_a_notebook_without_widgets_shows_lines_and_no_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich would print a warning of its own with every bar."""
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    shown: list[str] = []
    monkeypatch.setattr(rich.jupyter, "display", lambda segments, text: shown.append(text))
    notebook = Console(force_jupyter=True, width=200)
    with warnings.catch_warnings(), Report(tmp_path, 5, 0, notebook) as report:
        warnings.simplefilter("error")
        report.update(0, METRICS)
        with progress_bar("calibrating", 3, notebook) as tick:
            tick(3)
    assert "update 1/5  accuracy 0.625" in "".join(shown)


def test_the_log_and_tensorboard_hold_every_update_once_after_a_resumption(tmp_path: Path) -> None:
    run(tmp_path, 0, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 5, "accur')  # killed in the middle of a line
    run(tmp_path, 2, 5)  # the checkpoint was that of update 2
    lines = read_log(tmp_path)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["accuracy"] for line in lines] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert lines[0]["keep_was_better"] is None  # JSON knows no NaN
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    events = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    assert [event.step for event in events.Scalars("accuracy")] == [1, 2, 3, 4, 5]
    assert events.Scalars("acceptance_length")[0].value == pytest.approx(5.25)


def test_learning_is_drawn(tmp_path: Path) -> None:
    run(tmp_path, 0, 5)
    assert plot_learning(tmp_path).stat().st_size > 5000
