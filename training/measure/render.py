"""Rows of figures as a table: for the terminal (rich) and for documents (Markdown), from one set of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A heading and what stands below it; ``narrow``: the heading as a terminal breaks it."""

    heading: str
    cell: Callable[[Row], str]
    left: bool = False
    narrow: str | None = None


def _number(key: str, digits: int, heading: str, narrow: str | None = None) -> Column:
    return Column(heading, lambda row: "" if row.get(key) is None else f"{row[key]:.{digits}f}", narrow=narrow)


def _paired(write: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: write(row["paired_vs_target"]) if row.get("paired_vs_target") else ""


def _accuracy(row: Row) -> str:
    low, high = row["accuracy_ci95"]
    return f"{100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


COLUMNS = {
    "mode": Column("mode", lambda row: str(row["mode"]), left=True),
    "accuracy": Column("accuracy (95 %)", _accuracy, narrow="accuracy\n(95 %)"),
    "difference": Column(
        "vs target", _paired(lambda paired: f"{100 * paired['difference']:+.1f}"), narrow="vs\ntarget"
    ),
    "changes": Column("against target", _paired(lambda p: f"+{p['gained']} -{p['lost']}, p = {p['p_value']:.1g}")),
    "bound": Column("loss below", lambda row: f"{100 * row['loss_bound']:.2f}"),
    "p": Column("p", _paired(lambda paired: f"{paired['p_value']:.1g}")),
    "acceptance_length": _number("acceptance_length", 2, "acceptance length", "accept-\nance\nlength"),
    "override_rate": _number("override_rate", 2, "override rate", "over-\nride\nrate"),
    "mismatches": _number("num_mismatches", 0, "mismatches", "mis-\nmatches"),
    "overrides": _number("num_overrides", 0, "overrides", "over-\nrides"),
    "tokens": _number("mean_output_tokens", 1, "tokens"),
    "capped": _number("length_cap_hits", 0, "capped"),
    "speed": _number("tokens_per_s", 0, "tokens/s", "tokens\n/s"),
    "ttft": _number("ttft_ms_p50", 1, "TTFT ms", "TTFT\nms"),
    "tpot": _number("tpot_ms_p50", 1, "TPOT ms", "TPOT\nms"),
    "itl": _number("itl_ms_p99", 1, "ITL p99 ms", "ITL\np99 ms"),
}
QUALITY = ("mode", "accuracy", "difference", "p", "acceptance_length", "override_rate", "tokens", "capped")
CALIBRATED = ("mode", "accuracy", "difference", "bound", "acceptance_length", "override_rate", "tokens", "capped")
COUNTED = ("mode", "accuracy", "acceptance_length", "mismatches", "overrides", "speed")
SPEED = ("mode", "speed", "ttft", "tpot", "itl", "acceptance_length", "accuracy", "changes", "tokens", "capped")


def rich_table(rows: Sequence[Row], title: str, columns: Sequence[str] = QUALITY) -> Table:
    """Return rows as a table for the terminal; ``columns`` are names in ``COLUMNS``.

    In a terminal of 80 columns it stays whole: a mode and its accuracy take several lines where they must, a heading
    as many as ``narrow`` has, and no figure is cut.
    """
    close = len(columns) > 8
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0 if close else 1, 0, 0))
    for name in columns:
        column = COLUMNS[name]
        heading = column.narrow or column.heading
        words = [word for text in (heading, *map(column.cell, rows)) for word in text.split()]
        width = None if column.left else max(map(len, words))
        table.add_column(heading, justify="left" if column.left else "right", overflow="fold", min_width=width)
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
