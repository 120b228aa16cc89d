"""One renderer: the same cells for the terminal and for Markdown; one plot helper."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.outcome import Outcome, table_of
from vllm_cospec.training.measure.plots import SPEED as SPEED_AXIS
from vllm_cospec.training.measure.plots import plot_accuracy, plot_curves
from vllm_cospec.training.measure.render import (
    CALIBRATED,
    COLUMNS,
    COUNTED,
    QUALITY,
    SPEED,
    markdown_table,
    named,
    rich_table,
)


def rows() -> list[dict]:
    def outcome(right: int) -> Outcome:
        scores = (np.arange(100) < right).astype(float)
        return Outcome(
            np.arange(100), scores, np.full(100, 12), np.zeros(100, bool), Counts(10, 25, (10, 15), 40, 10), 4.0
        )

    return table_of({"target": outcome(40), "learned": outcome(52)}, "target")


def test_the_terminal_and_markdown_show_the_same_cells() -> None:
    text = markdown_table(rows())
    lines = text.splitlines()
    assert (
        lines[0] == "| mode | accuracy (95 %) | vs target | p | acceptance length | override rate | tokens | capped |"
    )
    assert lines[2] == "| target | 40.0 % (30.9 to 49.8) |  |  | 3.50 | 0.25 | 12.0 | 0 |"
    assert lines[3] == "| learned | 52.0 % (42.3 to 61.5) | +12.0 | 0.0005 | 3.50 | 0.25 | 12.0 | 0 |"
    shown = io.StringIO()
    Console(file=shown, width=200).print(rich_table(rows(), "title"))
    for line in lines[2:]:
        for cell in line.strip("| ").split("|"):
            assert cell.strip() in shown.getvalue()


def test_every_column_shows_a_row_that_lacks_it_as_blank() -> None:
    bare = {"mode": "learned", "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}
    for columns in (QUALITY, COUNTED, SPEED):
        assert set(columns) <= set(COLUMNS)
        assert "nan" not in markdown_table([bare], columns)
    assert named({"learned": {"accuracy": 1}}) == [{"mode": "learned", "accuracy": 1}]


@pytest.mark.parametrize("columns", [QUALITY, CALIBRATED, COUNTED, SPEED])
def test_a_terminal_of_80_columns_shows_every_name_and_every_figure_whole(columns: tuple[str, ...]) -> None:
    (row,) = (row for row in rows() if row["mode"] == "learned")
    row |= {
        "mode": "x" * 54, "loss_bound": 0.0123, "tokens_per_s": 12345.6, "ttft_ms_p50": 1234.5, "tpot_ms_p50": 123.4,
        "itl_ms_p99": 1234.5, "num_mismatches": 123456, "num_overrides": 12345, "mean_output_tokens": 226.1,
    }  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=80).print(rich_table([row], "title", columns))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (rule,) = (number for number, line in enumerate(lines) if line.startswith("─"))
    heading, body = " ".join(lines[1:rule]), lines[rule + 1 :]
    figures = 0
    for column in (COLUMNS[one] for one in columns if one != "mode"):
        assert set((column.narrow or column.heading).split()) <= set(heading.split()), column.heading
        assert set(column.cell(row).split()) <= set(" ".join(body).split()), column.heading
        figures += len(column.cell(row).split())
    assert figures > 5
    assert "".join(body).count("x") == 54


def test_a_plot_draws_every_group_with_its_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, Any] = {}
    errorbar = Axes.errorbar

    def record(self: Axes, x: Any, y: Any, **options: Any) -> Any:
        drawn[options["label"]] = x, y, options["xerr"], options["yerr"]
        return errorbar(self, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", record)
    row = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.7], "tokens_per_s": 10.0, "rounds_tokens_per_s": [8.0, 13.0]}
    slower = {**row, "tokens_per_s": 5.0, "rounds_tokens_per_s": None}
    row["threshold"] = 0.5
    path = plot_accuracy(tmp_path / "plot.png", {"a": [row, slower]}, SPEED_AXIS, labels="threshold", level=0.5)
    assert path.read_bytes().startswith(b"\x89PNG")
    x, y, xerr, yerr = drawn["a"]
    assert (x, y) == ([5.0, 10.0], [0.5, 0.5])
    assert xerr == [[0.0, 2.0], [0.0, 3.0]]
    assert np.allclose(yerr, [[0.1, 0.1], [0.2, 0.2]])


def test_curves_leave_out_lines_without_the_figure(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"update": 1, "accuracy": 0.5}, {"update": 2, "accuracy": None}, {"update": 3}]
    groups: dict[str, list[dict[str, Any]]] = {"": lines, "other": []}
    panels = {"accuracy": "accuracy", "entropy": "entropy", "override_rate": "override rate"}
    path = plot_curves(tmp_path / "curves.png", groups, panels, ("update", "update"))
    assert path.read_bytes().startswith(b"\x89PNG")
