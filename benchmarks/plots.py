"""Plots of benchmark results."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def speed_and_quality(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw accuracy, with 95 % intervals, against tokens per second, with the spread over rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        speed, accuracy, speeds = row["tokens_per_s"], row["accuracy"], row["rounds_tokens_per_s"]
        low, high = row["accuracy_ci95"]
        axes.errorbar(
            [speed], [accuracy], xerr=[[max(0.0, speed - min(speeds))], [max(0.0, max(speeds) - speed)]],
            yerr=[[accuracy - low], [high - accuracy]], fmt="o", capsize=3, label=row["mode"],
        )  # fmt: skip
    axes.set(xlabel="output tokens per second (range over rounds)", ylabel="accuracy (95 % interval)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
