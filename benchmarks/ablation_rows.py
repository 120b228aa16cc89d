"""The rows of the ablations: one arbiter, served in one way; kept a file each, so that nothing is measured twice."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_cospec.atomic import write_text
from vllm_cospec.training.measure.intervals import accuracy_interval
from vllm_cospec.training.measure.outcome import Outcome, paired_figures

ORDER = ("strict", "", "warm start and", "RL", "warm start alone", "logistic", "without", "trained")
"""How variants begin, from the first line of a table to the last; the empty one stands for the rule."""


@dataclass(frozen=True)
class AblationRow:
    """An arbiter, or a rule, on the test problems."""

    variant: str
    seed: int  # of training; 0 where nothing was trained
    temperature: float
    num_speculative_tokens: int
    threshold: float | None = None
    acceptance_length: float = 0.0
    override_rate: float = 0.0
    right: str = ""  # a digit for each test problem: 1 for a right answer

    @property
    def key(self) -> str:
        """Identifies it."""
        return f"{self.variant}, seed {self.seed}, T = {self.temperature:g}, K = {self.num_speculative_tokens}"

    @property
    def scores(self) -> np.ndarray:
        """0 or 1 for each test problem, float64 [n]."""
        return np.array([float(digit) for digit in self.right])

    def with_outcome(self, outcome: Outcome, threshold: float | None) -> AblationRow:
        """Return it with what was measured; answers are right or wrong, nothing between."""
        return replace(
            self,
            threshold=threshold,
            acceptance_length=round(outcome.counts.acceptance_length, 4),
            override_rate=round(outcome.counts.override_rate, 4),
            right="".join("01"[int(score)] for score in outcome.scores),
        )

    def as_json(self) -> dict[str, Any]:
        """Return what a result file holds of it."""
        low, high = accuracy_interval(self.scores)
        return asdict(self) | {"accuracy": float(self.scores.mean()), "accuracy_ci95": [low, high]}


def save_row(work: Path, row: AblationRow) -> None:
    """Keep a row."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", row.key)
    write_text(work / "rows" / f"{name}.json", json.dumps(asdict(row)) + "\n")


def saved_rows(work: Path) -> list[AblationRow]:
    """Return what is kept, in the order of its keys."""
    found = (AblationRow(**json.loads(path.read_text())) for path in (work / "rows").glob("*.json"))
    return sorted(found, key=lambda row: row.key)


def from_result(result: dict[str, Any]) -> list[AblationRow]:
    """Return the rows of a result file."""
    return [AblationRow(**{name: row[name] for name in AblationRow.__dataclass_fields__}) for row in result["rows"]]


def markdown(rows: Sequence[AblationRow], rule: str) -> str:
    """Return the rows as a table in Markdown, one line for each variant and way of serving, seeds side by side.

    Args:
        rows: from :func:`saved_rows` or :func:`from_result`.
        rule: the variant that the arbiters served like it are compared with, on the same problems.
    """
    against = next((row for row in rows if row.variant == rule), None)
    lines = [
        "| arbiter | served at | accuracy of each seed | mean | acceptance length | threshold | against the rule |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float, int], list[AblationRow]] = {}
    for row in sorted(rows, key=lambda row: _place(row, rule)):
        groups.setdefault((row.variant, row.temperature, row.num_speculative_tokens), []).append(row)
    for (variant, temperature, k), own in groups.items():
        accuracy = [100 * float(row.scores.mean()) for row in own]
        alike = against is not None and (temperature, k) == (against.temperature, against.num_speculative_tokens)
        cells = (
            f"`{variant}`" if variant == rule else variant,
            f"T = {temperature:g}, K = {k}",
            ", ".join(f"{value:.1f}" for value in accuracy),
            f"{np.mean(accuracy):.1f} %",
            f"{np.mean([row.acceptance_length for row in own]):.2f}",
            ", ".join("" if row.threshold is None else f"{row.threshold:g}" for row in own),
            ", ".join(f"{100 * float((row.scores - against.scores).mean()):+.1f}" for row in own)
            if against and alike and variant != rule
            else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _place(row: AblationRow, rule: str) -> tuple[int, float]:
    """Where a row stands in a table: by its variant, then by temperature."""
    found = [i for i, begins in enumerate(ORDER) if begins and row.variant.startswith(begins)]
    return (ORDER.index("") if row.variant == rule else min(found, default=len(ORDER))), row.temperature


def paired(ours: AblationRow, theirs: AblationRow) -> str:
    """Return how many problems one answers rightly and the other wrongly, both ways, and McNemar's p."""
    found = paired_figures(ours.scores, theirs.scores)
    (low, high), p = found["ci95"], found["p_value"]
    return (
        f"{100 * found['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), "
        f"+{found['gained']} -{found['lost']}, " + (f"p = {p:.1g}" if p >= 1e-99 else "p < 1e-99")
    )
