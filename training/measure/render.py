"""Rows of figures as a table: for the terminal (rich) and for documents (Markdown), from one set of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A heading and what stands below it."""

    heading: str
    cell: Callable[[Row], str]
    left: bool = False


def _number(key: str, digits: int, heading: str) -> Column:
    return Column(heading, lambda row: "" if row.get(key) is None else f"{row[key]:.{digits}f}")


def _paired(write: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: write(row["paired_vs_target"]) if row.get("paired_vs_target") else ""


def _accuracy(row: Row) -> str:
    low, high = row["accuracy_ci95"]
    return f"{100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


COLUMNS = {
    "mode": Column("mode", lambda row: str(row["mode"]), left=True),
    "accuracy": Column("accuracy (95 %)", _accuracy),
    "difference": Column("vs target", _paired(lambda paired: f"{100 * paired['difference']:+.1f}")),
    "changes": Column("against target", _paired(lambda p: f"+{p['gained']} -{p['lost']}, p = {p['p_value']:.1g}")),
    "bound": Column("loss below", lambda row: f"{100 * row['loss_bound']:.2f}"),
    "p": Column("p", _paired(lambda paired: f"{paired['p_value']:.1g}")),
    "acceptance_length": _number("acceptance_length", 2, "acceptance length"),
    "override_rate": _number("override_rate", 2, "override rate"),
    "mismatches": _number("num_mismatches", 0, "mismatches"),
    "overrides": _number("num_overrides", 0, "overrides"),
    "tokens": _number("mean_output_tokens", 1, "tokens"),
    "capped": _number("length_cap_hits", 0, "capped"),
    "speed": _number("tokens_per_s", 0, "tokens/s"),
    "ttft": _number("ttft_ms_p50", 1, "TTFT ms"),
    "tpot": _number("tpot_ms_p50", 1, "TPOT ms"),
    "itl": _number("itl_ms_p99", 1, "ITL p99 ms"),
}
QUALITY = ("mode", "accuracy", "difference", "p", "acceptance_length", "override_rate", "tokens", "capped")
CALIBRATED = ("mode", "accuracy", "difference", "bound", "acceptance_length", "override_rate", "tokens", "capped")
COUNTED = ("mode", "accuracy", "acceptance_length", "mismatches", "overrides", "speed")
SPEED = ("mode", "speed", "ttft", "tpot", "itl", "acceptance_length", "accuracy", "changes", "tokens", "capped")


def rich_table(rows: Sequence[Row], title: str, columns: Sequence[str] = QUALITY) -> Table:
    """Return rows as a table for the terminal; ``columns`` are names in ``COLUMNS``."""
    table = Table(title=title)
    for name in columns:
        column = COLUMNS[name]
        table.add_column(column.heading, justify="left" if column.left else "right", no_wrap=not column.left)
    for row in rows:
        table.add_row(*(COLUMNS[name].cell(row) for name in columns))
    return table


def markdown_table(rows: Sequence[Row], columns: Sequence[str] = QUALITY) -> str:
    """Return rows as a table in Markdown, without a line break at its end."""
    lines = [
        "| " + " | ".join(COLUMNS[name].heading for name in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(COLUMNS[name].cell(row) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def named(rows: Mapping[str, Row]) -> list[Row]:
    """Return rows that are kept by mode, as artefacts keep them, with the mode inside."""
    return [{"mode": mode, **row} for mode, row in rows.items()]
