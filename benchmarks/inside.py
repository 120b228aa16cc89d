"""How fast modes answer without a server: engines of one process take turns on every batch, for several K and loads.

A busy machine is slow at one moment and fast at the next. Here every mode has answered a batch before that changes, and
what is compared is the time for the same batches; no prefix is cached. What was measured is kept batch by batch, so
that a run can be stopped and go on. Speeds are ratios of sums; intervals resample batches, the same ones for both.

    python -m benchmarks.inside --config training/configs/code.toml --arbiter benchmarks/code/arbiter --work DIR \\
        --json FILE
    python -m benchmarks.inside --config training/configs/code.toml --arbiter benchmarks/code/arbiter --work DIR \\
        --concurrency 1 --k 4,8 --long 128    # answers that go on behind their end
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.command import run as run_command
from benchmarks.command import wide_console
from benchmarks.resumed import drop_cut_line, require_alike
from benchmarks.setup import Setup, served, set_up
from benchmarks.side_by_side import turns
from benchmarks.sweep import numbers
from vllm_cospec.atomic import write_text
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.artefact import short_name
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.intervals import accuracy_interval, middle, resampled_quotient, resamples
from vllm_cospec.training.measure.modes import parse_mode, split_modes
from vllm_cospec.training.measure.plots import plot_accuracy
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.tasks import digest, load_task

ABOUT, BATCHES = "about.json", "batches.jsonl"
TARGET, STANDARD = "target", "standard"
ROUND = 16  # prompts of each load in a round; no load is larger
RESAMPLES = 4000
KV_BYTES = 2**28  # of each engine
FEWEST = 5  # batches, for an interval
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""With one thread and a quiet machine both say the same; only the second leaves out what other programs were given."""

Speed = Callable[["TimedBatch"], tuple[float, float]]  # what was done, and in which time


@dataclass(frozen=True)
class TimedBatch:
    """What one mode made of one batch of prompts that were asked at once."""

    concurrency: int
    k: int  # 0 for the target, which drafts nothing
    mode: str
    number: int  # of the batch, within its load
    seconds: float
    first: list[float]  # seconds to each answer's first token
    last: list[float]  # to its last
    tokens: list[int]
    steps: list[int]  # target passes of each answer, the prompt's own included
    right: list[float]


def whole(batch: TimedBatch) -> tuple[float, float]:
    """Tokens, in the time from asking to the last answer's end."""
    return float(sum(batch.tokens)), batch.seconds


def answers(batch: TimedBatch) -> tuple[float, float]:
    """Answers, in the same time."""
    return float(len(batch.tokens)), batch.seconds


def behind_first(batch: TimedBatch) -> tuple[float, float]:
    """Tokens behind each answer's first one, in the time they took: the prompt's own step is left out."""
    return float(sum(batch.tokens) - len(batch.tokens)), float(np.sum(batch.last) - np.sum(batch.first))


SPEEDS: dict[str, Speed] = {"tokens": whole, "answers": answers, "tokens_behind_first": behind_first}


def answer(
    engine: Any, prompts: Sequence[Sequence[int]], params: Any, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, dict[str, list[Any]], list[str]]:
    """Ask an engine for a batch at once; times are those of a clock.

    Returns:
        Seconds; first, last, tokens and steps of a :class:`TimedBatch`; the texts.
    """
    events: dict[str, list[float]] = {}
    outputs: dict[str, Any] = {}
    began = clock()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
    while engine.has_unfinished_requests():
        done = engine.step()
        now = clock() - began
        for output in done:
            events.setdefault(output.request_id, []).append(now)
            outputs[output.request_id] = output.outputs[0]
    seconds = clock() - began
    names = [str(number) for number in range(len(prompts))]
    figures: dict[str, list[Any]] = {
        "first": [events[n][0] for n in names], "last": [events[n][-1] for n in names],
        "tokens": [len(outputs[n].token_ids) for n in names], "steps": [len(events[n]) for n in names],
    }  # fmt: skip
    return seconds, figures, [outputs[n].text for n in names]


def speed(batches: Sequence[TimedBatch], of: Speed) -> tuple[float, list[float] | None]:
    """Return what was done in a second, the sum over the time's sum, with its 95 % bootstrap interval."""
    own = np.array([of(batch) for batch in batches])
    drawn = own[resamples(len(own), RESAMPLES)].sum(1)
    interval = middle(drawn[:, 0] / drawn[:, 1])
    return float(own[:, 0].sum() / own[:, 1].sum()), interval if len(own) >= FEWEST else None


def times(ours: Sequence[TimedBatch], theirs: Sequence[TimedBatch], of: Speed) -> tuple[float, list[float] | None]:
    """Return how many times as fast one was as the other on the same batches, with its 95 % bootstrap interval."""
    one, two = (np.array([of(batch) for batch in side]) for side in (ours, theirs))
    found, interval = resampled_quotient(one, two, RESAMPLES)
    return found, interval if len(one) >= FEWEST else None


def rows_of(batches: Sequence[TimedBatch]) -> list[dict[str, Any]]:
    """Return a row of figures for each load, K and mode, compared with the target and, at the same K, with standard."""
    grouped: dict[tuple[int, int, str], dict[int, TimedBatch]] = {}
    for batch in batches:
        grouped.setdefault((batch.concurrency, batch.k, batch.mode), {})[batch.number] = batch
    rows = []
    for (concurrency, k, mode), own in sorted(grouped.items()):
        mine = list(own.values())
        right = np.array(list(itertools.chain.from_iterable(batch.right for batch in mine)))
        tokens, steps = (
            np.array([*itertools.chain.from_iterable(getattr(batch, name) for batch in mine)])
            for name in ("tokens", "steps")
        )
        row: dict[str, Any] = {
            "concurrency": concurrency, "num_speculative_tokens": k, "mode": mode, "num_batches": len(mine),
            "num_answers": len(right), "accuracy": float(right.mean()), "accuracy_ci95": list(accuracy_interval(right)),
            "acceptance_length": Counts.of_responses(tokens, steps).acceptance_length,
            "mean_output_tokens": float(tokens.mean()),
            "ttft_ms_p50": 1e3 * float(np.median(list(itertools.chain.from_iterable(b.first for b in mine)))),
        }  # fmt: skip
        for name, of in SPEEDS.items():
            row[f"{name}_per_s"], row[f"{name}_per_s_ci95"] = speed(mine, of)
            for base, place in (("target", (concurrency, 0, TARGET)), ("standard", (concurrency, k, STANDARD))):
                both = sorted(own.keys() & grouped.get(place, {}).keys())
                if mode not in (base, TARGET) and both:
                    pair = [own[n] for n in both], [grouped[place][n] for n in both]
                    row[f"{name}_times_{base}"], row[f"{name}_times_{base}_ci95"] = times(*pair, of)
        rows.append(row)
    return rows


def build_engines(
    setup: Setup, modes: Sequence[str], lengths: Sequence[int], arbiter: str, most: int
) -> dict[tuple[int, str], Any]:
    """Return engines by K and mode; the target's K is 0."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    options = {**setup.pair.engine, "max_num_seqs": most, "kv_cache_memory_bytes": KV_BYTES,
               "enable_prefix_caching": False, "disable_log_stats": True}  # fmt: skip
    found = {}
    for k, name in [(0, TARGET), *itertools.product(lengths, modes)]:
        pair = setup.pair.model_copy(update={"num_speculative_tokens": max(1, k)})
        model, speculative = served(parse_mode(name, where="--modes"), pair, arbiter)
        found[k, name] = LLM(model, speculative_config=speculative, **options).llm_engine
    return found


def measure(
    engines: dict[tuple[int, str], Any], setup: Setup, places: Sequence[tuple[int, int, range]], seconds: float,
    goes_on: bool, clock: Callable[[], float],
) -> Iterator[list[TimedBatch]]:  # fmt: skip
    """Ask every engine for one batch after another; yields what they made of each.

    Args:
        engines: by K and mode.
        setup: prompts and task.
        places: load, number and problems of each batch.
        seconds: no batch is begun later than this.
        goes_on: whether answers go on behind their end.
        clock: that times them.
    """
    from vllm import SamplingParams

    task = load_task(setup.task.name, **setup.task.options)
    params = SamplingParams(temperature=0, max_tokens=setup.max_tokens, ignore_eos=goes_on)
    few = SamplingParams(temperature=0, max_tokens=8)
    for engine in engines.values():  # the first passes of a shape are slower
        for load in sorted({load for load, _, _ in places}):
            answer(engine, [prompt[::-1] for prompt in setup.prompts[:load]], few)
    began = time.perf_counter()
    for load, number, asked in places:
        if time.perf_counter() - began > seconds:
            return
        found = []
        for length, name in turns(engines, number):
            took, figures, texts = answer(engines[length, name], [setup.prompts[i] for i in asked], params, clock)
            right = [task.score(setup.problems[i], text) for i, text in zip(asked, texts, strict=True)]
            found.append(TimedBatch(load, length, name, number, took, right=right, **figures))
        yield found


def shares(round_number: int, load: int, place: int, loads: int) -> Iterator[tuple[int, range]]:
    """Yield number and problems of each batch of a load in a round; no two loads ask the same problems."""
    first, many = (round_number * loads + place) * ROUND, ROUND // load
    for part in range(many):
        yield round_number * many + part, range(first + part * load, first + (part + 1) * load)


def read(work: Path, about: dict[str, Any]) -> list[TimedBatch]:
    """Return the batches of a directory that was begun alike, or begin one.

    Raises:
        ConfigError: it was begun otherwise.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / ABOUT).exists():
        write_text(work / ABOUT, json.dumps(about, indent=1) + "\n")
    found = json.loads((work / ABOUT).read_text())
    require_alike(found, about, f"--work: {work} holds batches with other", "directory")
    drop_cut_line(work / BATCHES)
    lines = (work / BATCHES).read_text().splitlines() if (work / BATCHES).exists() else []
    return [TimedBatch(**row) for line in lines for row in json.loads(line)]


def main(
    work: Annotated[Path, typer.Option(help="Directory for what is measured; what is there is kept.")],
    config: Annotated[Path, typer.Option(help="Training configuration of pair and task.")],
    arbiter: Annotated[str, typer.Option(help="Trained arbiter, for learned.")],
    modes: Annotated[str, typer.Option(help="Modes beside target, separated by semicolons.")] = "standard;learned",
    k: Annotated[str, typer.Option(help="Numbers of speculative tokens, separated by commas.")] = "4,8,12",
    concurrency: Annotated[str, typer.Option(help="Numbers of prompts at once, up to 16.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1, help="In each, 16 prompts of every load.")] = 6,
    seconds: Annotated[float, typer.Option(min=0, help="No batch is begun later than this after the first.")] = 1e9,
    long: Annotated[int, typer.Option(min=0, help="Tokens of every answer, wherever it would end; 0: as it is.")] = 0,
    clock: Annotated[str, typer.Option(help="wall, or cpu: what the process was given, for a busy machine.")] = "wall",
    seed: Annotated[int, typer.Option(help="Which problems.")] = 2026,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against speed into this PNG.")] = None,
    accuracy: Annotated[
        Path | None, typer.Option(help="Result of benchmarks.natural whose accuracies are drawn; many more lines.")
    ] = None,
) -> None:
    """Measure speeds in engines that take turns."""
    lengths, loads = numbers(k, "--k"), numbers(concurrency, "--concurrency")
    if any(ROUND % load for load in loads):
        raise ConfigError(
            f"--concurrency: {concurrency!r} has numbers that do not divide {ROUND}; write for example 1,4,16"
        )
    if clock not in CLOCKS:
        raise ConfigError(f"--clock: {clock!r} is none of {', '.join(CLOCKS)}")
    names = split_modes(modes)
    setup = set_up(config, {}, None, None, rounds * len(loads) * ROUND, seed, long or None)
    about = {
        "models": [short_name(setup.pair.target), short_name(setup.pair.draft or "")], "engine": setup.pair.engine,
        "task": setup.task.name, "modes": names, "k": lengths, "concurrency": loads, "long": long, "seed": seed,
        "problems_sha256": digest(setup.problems), "threads": os.environ.get("OMP_NUM_THREADS"), "clock": clock,
    }  # fmt: skip
    batches = read(work, about)
    done = {(batch.concurrency, batch.number) for batch in batches if batch.mode == TARGET}
    left = [
        (load, number, asked)
        for turn in range(rounds)
        for place, load in enumerate(loads)
        for number, asked in shares(turn, load, place, len(loads))
        if (load, number) not in done
    ]
    if left and seconds:
        engines = build_engines(setup, names, lengths, arbiter, max(loads))
        for batch in measure(engines, setup, left, seconds, long > 0, CLOCKS[clock]):
            batches += batch
            with (work / BATCHES).open("a") as file:
                file.write(json.dumps([asdict(one) for one in batch]) + "\n")  # all modes or none
    report(batches, about, json_path, plot, accuracy)


def report(
    batches: Sequence[TimedBatch],
    about: dict[str, Any],
    json_path: Path | None,
    plot: Path | None,
    accuracy: Path | None,
) -> None:
    """Show the figures, and write them."""
    rows = rows_of(batches)
    console = wide_console()
    for row in rows:
        against = f", {row['tokens_times_standard']:.2f} times standard" if "tokens_times_standard" in row else ""
        console.print(
            f"{row['concurrency']} at once, K = {row['num_speculative_tokens']}, {row['mode']}: "
            f"{row['tokens_per_s']:.1f} tokens/s{against}; first token {row['ttft_ms_p50']:.0f} ms, then "
            f"{row['tokens_behind_first_per_s']:.1f} tokens/s; {row['num_answers']} answers", markup=False,
        )  # fmt: skip
    if json_path is not None:
        write_result(json_path, {"schema": 1, "about": about, "rows": rows})
    if plot is not None:
        draw(plot, rows, None if accuracy is None else json.loads(accuracy.read_text()))


def accuracy_of(mode: str, answered: dict[str, Any]) -> dict[str, Any]:
    """Return accuracy and interval of a mode from a result of :mod:`benchmarks.natural`.

    Raises:
        ConfigError: the mode was not asked there.
    """
    wanted = "strict" if mode in (TARGET, STANDARD) else mode  # greedy: the target's own answers
    for name, row in answered["test"]["modes"].items():
        if name.rpartition(": ")[2] == wanted:
            return {key: row[key] for key in ("accuracy", "accuracy_ci95")}
    raise ConfigError(f"--accuracy: the file has no answers of {wanted!r}; ask for them with benchmarks.natural")


def draw(path: Path, rows: Sequence[dict[str, Any]], answered: dict[str, Any] | None) -> None:
    """Draw accuracy against speed at the smallest load and the smallest K, a point for each mode and the target."""
    load = min(row["concurrency"] for row in rows)
    k = min(row["num_speculative_tokens"] for row in rows if row["mode"] != TARGET)
    shown = [row for row in rows if row["concurrency"] == load and row["num_speculative_tokens"] in (0, k)]
    groups = {
        row["mode"]: [{**row, "rounds_tokens_per_s": row["tokens_per_s_ci95"] or [row["tokens_per_s"]],
                       **(accuracy_of(row["mode"], answered) if answered else {})}]
        for row in shown
    }  # fmt: skip
    plot_accuracy(path, groups, ("tokens_per_s", f"tokens per second, {load} at once, K = {k} (95 % interval)"))


if __name__ == "__main__":
    run_command(main)
