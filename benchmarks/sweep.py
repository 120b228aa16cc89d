"""Which K for how many requests at once: modes timed in interleaved rounds, for every K and every load.

What is compared is the ratio to ``target`` within a round: a machine that is slower for a while slows both. ``target``
is always asked. Pair, engine settings and task come from a training configuration, by default that of the bundled pair.
Servers start once for each K. A result file keeps what it has of other K and loads: a sweep can be run in parts.

    python benchmarks/sweep.py --k 4,8,12 --concurrency 1,4,16 --partition --json FILE --plot FILE
    python benchmarks/sweep.py --config training/configs/code.toml --arbiter benchmarks/code/arbiter --concurrency 1
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rounds as results
from benchmarks.command import run, wide_console
from benchmarks.load import Load
from benchmarks.resumed import require_alike
from benchmarks.setup import served, set_up
from benchmarks.throughput import BUNDLED_ARBITER, require_shares, run_rounds
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.artefact import short_name
from vllm_cospec.training.measure.modes import parse_mode, split_modes
from vllm_cospec.training.measure.outcome import Outcome
from vllm_cospec.training.measure.plots import SPEED, plot_accuracy, plot_curves
from vllm_cospec.training.measure.provenance import command_line, write_result
from vllm_cospec.training.tasks import digest

BASE = "target"
FIGURES = {"tokens_per_s": 0, "ttft_ms_p50": 0, "acceptance_length": 2}  # digits shown of each


def numbers(text: str, option: str) -> list[int]:
    """Read whole numbers from 1 on, separated by commas.

    Raises:
        ConfigError: there is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option}: {text!r} is no list of whole numbers from 1 on; write for example 4,8,12")
    return sorted({int(part) for part in parts})


def rows_of(rounds: results.Rounds, k: int, concurrency: int) -> list[dict[str, Any]]:
    """Return the figures of each mode at one K and load, with its tokens per second against target and standard."""
    found = []
    for row in results.rows(rounds):
        place = {"concurrency": concurrency, "num_speculative_tokens": k}
        against: dict[str, Any] = {}
        for base in (base for base in results.BASES if rounds.get(base)):
            quotients = results.quotients(rounds, row["mode"], base)
            against |= {
                f"times_{base}": statistics.median(quotients), f"rounds_times_{base}": quotients,
                f"times_{base}_mean_ci95": results.mean_quotient(quotients),
            }  # fmt: skip
        found.append({**place, **row, **against})
    return found


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each load and mode but the target, the row of the K that was fastest."""
    speculating = [row for row in rows if row["mode"] != BASE]
    places = dict.fromkeys((row["concurrency"], row["mode"]) for row in speculating)
    return [
        max(
            (row for row in speculating if (row["concurrency"], row["mode"]) == place),
            key=lambda row: (row["times_target"], -row["num_speculative_tokens"]),
        )
        for place in places
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the sweep as a table for the terminal; the best K of a load and mode is marked."""
    shown, chosen = Table(title="tokens per second against the target, median of rounds"), best(rows)
    for heading in ("at a time", "K", "mode", "times target", "range", "tokens/s", "TTFT ms", "acceptance length"):
        shown.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=heading != "mode")
    for row in rows:
        low, high = min(row["rounds_times_target"]), max(row["rounds_times_target"])
        mark = " *" if any(row is one for one in chosen) else ""
        shown.add_row(
            str(row["concurrency"]), str(row["num_speculative_tokens"]), row["mode"],
            f"{row['times_target']:.2f}{mark}", f"{low:.2f} to {high:.2f}",
            *(f"{row[key]:.{digits}f}" for key, digits in FIGURES.items()),
        )  # fmt: skip
    return shown


def merged(earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return both, in order of load and K; where both have a K and load, the later ones."""
    new = {(row["concurrency"], row["num_speculative_tokens"]) for row in rows}
    old = [row for row in earlier if (row["concurrency"], row["num_speculative_tokens"]) not in new]
    return sorted([*old, *rows], key=lambda row: (row["concurrency"], row["num_speculative_tokens"]))


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw speed over K, a curve for each mode and load."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["mode"] != BASE:
            curves.setdefault(f"{row['mode']}, {row['concurrency']} at a time", []).append(row)
    panels = {"times_target": "tokens per second against the target", "acceptance_length": "acceptance length"}
    plot_curves(path, curves, panels, ("num_speculative_tokens", "K"))


def draw_accuracy(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy against speed at the smallest load, a curve for each mode, its points labelled with K."""
    fewest = min(row["concurrency"] for row in rows)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["concurrency"] == fewest:
            groups.setdefault(row["mode"], []).append(row)
    plot_accuracy(path, groups, SPEED, title=f"{fewest} at a time; beside a point: K", labels="num_speculative_tokens")


def earlier_rows(path: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a result file of the same sweep; none where there is no file.

    Raises:
        ConfigError: the file is of another sweep.
    """
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    require_alike(found.get("about", {}), about, f"--json: {path} holds a sweep with other", "file")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def main(
    config: Annotated[Path | None, typer.Option(help="Training configuration of pair and task.")] = None,
    arbiter: Annotated[str, typer.Option(help="Trained arbiter, for learned.")] = str(BUNDLED_ARBITER),
    modes: Annotated[str, typer.Option(help="Modes beside target, separated by commas or semicolons.")] = (
        "standard,learned"
    ),
    k: Annotated[str, typer.Option(help="Numbers of speculative tokens, separated by commas.")] = "4,8,12",
    concurrency: Annotated[str, typer.Option(help="Numbers of requests in flight, separated by commas.")] = "1,4,16",
    num_prompts: Annotated[int, typer.Option(min=2, help="Problems; every mode answers each, once a round.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    partition: Annotated[
        bool, typer.Option("--partition", help="Each round asks its own share of the problems.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 2026,
    one_server_at_a_time: Annotated[bool, typer.Option(help="Restart servers between modes: for one GPU.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed over K into this PNG.")] = None,
    accuracy_plot: Annotated[Path | None, typer.Option(help="Draw accuracy against speed into this PNG.")] = None,
) -> None:
    """Name the fastest K for each number of requests at once."""
    console = wide_console()
    lengths, loads = numbers(k, "--k"), numbers(concurrency, "--concurrency")
    parsed = [parse_mode(text, where="--modes") for text in dict.fromkeys([BASE, *split_modes(modes)])]
    if len(parsed) == 1:
        raise ConfigError("--modes: names no mode beside target; write for example standard,learned")
    require_shares(partition, num_prompts, rounds * len(loads))
    setup = set_up(config, {}, None, None, num_prompts, seed, None)
    models = [None if name is None else short_name(name) for name in (setup.pair.target, setup.pair.draft)]
    about = {
        "models": models, "engine": setup.pair.engine, "task": setup.task.name, "modes": [mode.name for mode in parsed],
        "arbiter": short_name(str(Path(arbiter).resolve())),
    }  # fmt: skip
    earlier = earlier_rows(json_path, about)
    origin = {"run": command_line(), "problems_sha256": digest(setup.problems)}
    rows: list[dict[str, Any]] = []
    for length in lengths:
        pair = setup.pair.model_copy(update={"num_speculative_tokens": length})
        servers = {mode.name: served(mode, pair, arbiter) for mode in parsed}
        outcomes: list[dict[str, list[Outcome]]] = [{name: [] for name in servers} for _ in loads]
        asked = [Load(setup.max_tokens, 0.0, in_flight, setup.max_model_len) for in_flight in loads]
        before = rows
        for number in run_rounds(
            replace(setup, pair=pair), servers, outcomes, rounds, asked, partition, one_server_at_a_time
        ):
            new = itertools.chain.from_iterable(map(rows_of, outcomes, itertools.repeat(length), loads))
            rows = [*before, *(origin | row for row in new)]
            if json_path is not None:  # after every round, so that a killed sweep leaves what it has
                complete = number == rounds - 1 and length == lengths[-1]
                kept = merged(earlier, rows)
                write_result(json_path, {"schema": 2, "about": about, "complete": complete, "rows": kept,
                                         "best": best(kept)})  # fmt: skip
    rows = merged(earlier, rows)
    console.print(table(rows))
    for row in best(rows):
        console.print(
            f"{row['concurrency']} at a time: {row['mode']} is fastest with K = {row['num_speculative_tokens']}, "
            f"{row['times_target']:.2f} times the target", markup=False,
        )  # fmt: skip
    if plot is not None:
        draw(plot, rows)
    if accuracy_plot is not None:
        draw_accuracy(accuracy_plot, rows)


if __name__ == "__main__":
    run(main)
