"""What the kit has found, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Return the report with a table per part; a part that did not run says so."""
    parts = [_machine(report)]
    if "kernels" in report:
        parts.append(_kernels(report["kernels"]))
    if "times" in report:
        parts += [_times(report["times"]["rows"]), _stages(report["times"]["rows"])]
        if report["times"]["left_out"]:
            left = ", ".join("/".join(map(str, setting)) for setting in report["times"]["left_out"])
            parts.append(f"Not timed, because the time was up: {left}.")
    if "engine" in report:
        parts += [_pairs(f"Engine with the bundled pair, {name}", found) for name, found in report["engine"].items()]
    if "sanitizer" in report:
        parts.append(_pairs("compute-sanitizer", report["sanitizer"]))
    found = report["problems"]
    parts.append("## Problems\n\n" + ("\n".join(f"- {text}" for text in found) if found else "None was found."))
    return "\n\n".join(parts) + "\n"


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; numbers are rounded, nothing is a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.0f}"
        if isinstance(value, bool) or not isinstance(value, int):
            return str(value).replace("|", "\\|").replace("\n", " ")
        return f"{value:,}"

    names = list(columns)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def _machine(report: dict[str, Any]) -> str:
    facts = {**report["device"], "parts": ", ".join(report["parts"]), "minutes": report["minutes"]}
    return f"# Verification on {report['device']['name']}\n\n" + table(("", ""), facts.items())


def _kernels(findings: dict[str, dict[str, Any]]) -> str:
    columns = ("comparison", "batches", "requests", "too close to call", "differences", "cut short")
    rows = [
        (name, f["batches"], f["requests"], f["too_close_to_call"], f["differences"], "yes" if f["cut_short"] else "no")
        for name, f in findings.items()
    ]
    return "## The compiled kernels\n\n" + table(columns, rows)


def _times(rows: list[dict[str, Any]]) -> str:
    columns = ("V", "batch", "draws", "what", "device µs", "of stock", "of one read", "host µs", "kept of mismatches")
    cells = [
        (r["vocab"], r["batch"], r["draws"], r["what"], r["device_us"], r["of_stock"], r["of_read"], r["host_us"],
         r.get("kept_of_mismatches"))
        for r in rows
    ]  # fmt: skip
    return "## Times: medians, each call from a cold cache\n\n" + table(columns, cells)


def _stages(rows: list[dict[str, Any]]) -> str:
    cells = [
        (r["vocab"], r["batch"], r["draws"], r["what"], stage, microseconds)
        for r in rows
        for stage, microseconds in r.get("stages_us", {}).items()
    ]
    return "## Stages\n\n" + table(("V", "batch", "draws", "policy", "kernel", "µs"), cells)


def _pairs(title: str, findings: dict[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), ", ".join(map(str, value)) or "none" if isinstance(value, list) else value)
        for name, value in findings.items()
    ]
    return f"## {title}\n\n" + table(("", ""), rows)
