"""The one plot of measurements: accuracy with its interval against something else. And curves over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACCEPTANCE = ("acceptance_length", "acceptance length (tokens per target step)")
SPEED = ("tokens_per_s", "output tokens per second (range over rounds)")


def plot_accuracy(
    path: Path,
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    x: tuple[str, str] = ACCEPTANCE,
    title: str = "",
    labels: str | None = None,
    level: float | None = None,
) -> Path:
    """Draw accuracy, with its 95 % interval, against another figure, and write the picture.

    Args:
        path: the PNG.
        groups: rows of figures by label; those of one group are joined by a line.
        x: key and description of the other figure. Where a row has ``rounds_KEY``, its range is drawn too.
        title: above the picture.
        labels: key of a figure that is written beside each point that has it.
        level: an accuracy that is drawn as a line, called "target only".

    Returns:
        ``path``.
    """
    from matplotlib.figure import Figure

    key, description = x
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for label, unordered in groups.items():
        rows = sorted(unordered, key=lambda row: row[key])
        values, accuracies = [row[key] for row in rows], [row["accuracy"] for row in rows]
        axes.errorbar(
            values,
            accuracies,
            xerr=_spread([(row[key], *_range(row, f"rounds_{key}", row[key])) for row in rows]),
            yerr=_spread([(row["accuracy"], *row["accuracy_ci95"]) for row in rows]),
            fmt="o-" if len(rows) > 1 else "s", capsize=3, elinewidth=0.8, label=label,
        )  # fmt: skip
        for row in rows:
            if labels is not None and labels in row:
                axes.annotate(f"{row[labels]:g}", (row[key], row["accuracy"]), xytext=(4, 4),
                              textcoords="offset points", fontsize=8)  # fmt: skip
    if level is not None:
        axes.axhline(level, linestyle=":", color="gray", label="target only")
    axes.set(xlabel=description, ylabel="accuracy (95 % interval)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return path


def plot_curves(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], panels: Mapping[str, str], x: tuple[str, str]
) -> Path:
    """Draw figures of runs over their course, a panel for each, and write the picture.

    Args:
        path: the PNG.
        runs: lines of a run's log, by label.
        panels: title of each figure's panel, by its key. Lines without it are left out.
        x: key and description of what the course is measured in.

    Returns:
        ``path``.
    """
    from matplotlib.figure import Figure

    columns = 2 if len(panels) > 1 else 1
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.3 * height), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(height, columns, squeeze=False).flat, panels.items(), strict=False):
        for label, lines in runs.items():
            points = [(line[x[0]], line[key]) for line in lines if line.get(key) is not None]
            axes.plot([at for at, _ in points], [value for _, value in points], label=label)
        axes.set(title=title, xlabel=x[1])
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()
    figure.savefig(path, dpi=110)
    return path


def _range(row: Mapping[str, Any], key: str, value: float) -> tuple[float, float]:
    values = row.get(key) or [value]
    return min(values), max(values)


def _spread(points: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Turn (value, low, high) into distances below and above, as matplotlib wants them."""
    return [[max(0.0, v - low) for v, low, _ in points], [max(0.0, high - v) for v, _, high in points]]
