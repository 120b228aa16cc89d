"""How often does the drift test cry wolf, and how soon does it notice? On real requests of the bundled pair.

`requests` has the pair answer problems of the task its arbiter was made for, and others. `simulate` calibrates on some
of the former, then sends streams of 10,000 of the rest, and streams that turn to something else after 1,000.

    python benchmarks/drift.py requests --output benchmarks/results/requests_demo.json
    python benchmarks/drift.py simulate benchmarks/results/requests_demo.json --json benchmarks/results/drift.json
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run, several, wide_console
from vllm_cospec.drift import FIGURES, LIMIT, RANGE_ERROR, STAKES, Finished, Traffic, bet, histogram, standardised
from vllm_cospec.kernels.scores import NUM_BINS
from vllm_cospec.training.config import bundled, load_train_config
from vllm_cospec.training.measure.intervals import wilson_interval
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.measure.traffic import traffic_of
from vllm_cospec.training.tasks import load_task
from vllm_cospec.training.tasks.demo import Expression, draw_expression

CALIBRATED = "three terms, one or two of them products"
PART = 256

app = several(__doc__)


def other_traffic(seed: int) -> dict[str, Callable[[], Iterator[Expression]]]:
    """Return problems the arbiter was not calibrated on, by name."""

    def of(**how: Any) -> Callable[[], Iterator[Expression]]:
        def stream() -> Iterator[Expression]:
            rng = random.Random(f"{seed}/{how}")
            while True:
                yield draw_expression(rng, **how)

        return stream

    return {
        "no products": of(num_terms=3, product_share=0.0),
        "one product": of(num_terms=1, product_share=1.0),
        "products of larger numbers": of(num_terms=3, product_share=0.25, large_share=1.0),
        "two terms": of(num_terms=2, product_share=0.25),
        "four terms": of(num_terms=4, product_share=0.25),
    }


@app.command()
def requests(
    output: Annotated[Path, typer.Option(help="Write the counts of the requests here.")],
    calibrated: Annotated[int, typer.Option(min=200, help="Requests like those of calibration.")] = 6000,
    other: Annotated[int, typer.Option(min=50, help="Requests of each other kind.")] = 500,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 2028,
) -> None:
    """Answer problems and keep what is counted of each request."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm_cospec.training.rollout.engine import Engine, Request

    config = load_train_config(Path(__file__).parents[1] / "training/configs/demo.toml")
    engine = Engine(config.pair, {"policy": "learned", "artefact": str(bundled("target").parent / "arbiter")})

    def count(prompts: list[str], temperature: float = 0.0) -> dict[str, int]:
        rows: Counter[str] = Counter()
        parts = [prompts[first : first + PART] for first in range(0, len(prompts), PART)]
        for number, part in enumerate(track(parts, console=Console(stderr=True))):
            asked = [
                Request(engine.encode(prompt), config.rollout.max_tokens, PART * number + i, temperature)
                for i, prompt in enumerate(part)
            ]
            for response in engine.run(asked):
                scores = np.array([decision.probability for decision in response.decisions], np.float32)
                kept = sum(decision.kept for decision in response.decisions)
                row = [len(response.tokens), len(scores), kept, *histogram(scores)]
                rows[" ".join(map(str, row))] += 1
        return dict(rows)

    usual = [problem.prompt for problem in load_task("demo").problems(seed, calibrated + other, "test")]
    kinds = {CALIBRATED: count(usual[:calibrated]), "the same, sampled at 1": count(usual[calibrated:], 1.0)}
    for name, stream in other_traffic(seed).items():
        prompts = dict.fromkeys(expression.prompt for expression, _ in zip(stream(), range(4 * other), strict=False))
        kinds[name] = count(list(prompts)[:other])
    columns = "tokens mismatches overrides " + " ".join(f"bin{i}" for i in range(NUM_BINS))
    write_result(output, {"seed": seed, "columns": columns, "requests": kinds})


def read(path: Path) -> dict[str, list[Finished]]:
    """Read what :func:`requests` wrote."""
    found: dict[str, list[Finished]] = {}
    for kind, rows in json.loads(path.read_text())["requests"].items():
        found[kind] = []
        for row, times in rows.items():
            tokens, mismatches, overrides, *bins = map(int, row.split())
            found[kind] += [Finished(tokens, mismatches, overrides, np.array(bins))] * times
    return found


def evidence(expected: Traffic, streams: Iterator[np.ndarray], number: int) -> Iterator[np.ndarray]:
    """Yield the evidence in each of S streams after each of their requests, [S].

    Args:
        expected: of calibration.
        streams: the figures of the next request of every stream, [S, FIGURES], again and again.
        number: S.
    """
    mean, deviation, low, high = (
        np.array([getattr(own, name) for own in expected.ranges]) for name in ("mean", "deviation", "low", "high")
    )
    capital = np.zeros((number, 2, len(STAKES), FIGURES))
    for figures in streams:
        capital = np.minimum(bet(capital, standardised(figures, mean, deviation), low, high), 1e12)  # an alarm long ago
        yield capital.mean(axis=(1, 2, 3))


@app.command()
def simulate(
    file: Annotated[Path, typer.Argument(help="What `requests` wrote.")],
    calibration: Annotated[int, typer.Option(min=50, help="Requests that calibration sees.")] = 1000,
    calibrations: Annotated[int, typer.Option(min=1, help="Calibrations, each with its own requests.")] = 20,
    streams: Annotated[int, typer.Option(min=1, help="Streams for each calibration.")] = 50,
    length: Annotated[int, typer.Option(min=100, help="Calibrated requests of a stream.")] = 10_000,
    before: Annotated[int, typer.Option(help="Calibrated requests before traffic changes.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the streams.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Count false alarms, and requests until a change is noticed."""
    kinds = read(file)
    rng = np.random.default_rng(seed)
    figures = {kind: np.array([request.figures() for request in own]) for kind, own in kinds.items()}
    usual, others = kinds[CALIBRATED], [kind for kind in kinds if kind != CALIBRATED]
    alarms, most, delays = 0, 0.0, {kind: list[int]() for kind in others}
    for _ in track(range(calibrations), description="simulating", console=Console(stderr=True)):
        order = rng.permutation(len(usual))
        expected = traffic_of([usual[i] for i in order[:calibration]])
        rest = figures[CALIBRATED][order[calibration:]]

        def calm(n: int, rest: np.ndarray = rest) -> Iterator[np.ndarray]:
            for _ in range(n):
                yield rest[rng.integers(len(rest), size=streams)]

        raised = np.zeros(streams, bool)
        for now in evidence(expected, calm(length), streams):
            raised |= now >= LIMIT
            most = max(most, float(now.max()))
        alarms += int(raised.sum())
        for kind in others:

            def changing(own: np.ndarray = figures[kind]) -> Iterator[np.ndarray]:
                yield from calm(before)
                while True:
                    yield own[rng.integers(len(own), size=streams)]

            delay = np.full(streams, -1)
            for i, now in enumerate(evidence(expected, changing(), streams), 1 - before):
                delay[(delay < 0) & (now >= LIMIT)] = i
                if i >= 2000 or (delay >= 0).all():
                    break
            delays[kind] += [int(d) if d >= 0 else 2001 for d in delay]
    rows: list[dict[str, Any]] = [
        {"traffic": kind, "median": float(np.median(own)), "p95": float(np.percentile(own, 95)), "most": max(own),
         "within_100": float(np.mean(np.array(own) <= 100))}
        for kind, own in delays.items()
    ]  # fmt: skip
    total = calibrations * streams
    low, high = wilson_interval(alarms, total)
    bound = length / LIMIT + RANGE_ERROR
    wide_console().print(
        f"{total} streams of {length} calibrated requests: {alarms} alarms ({100 * low:.2f} to {100 * high:.2f} %, "
        f"bound {100 * bound:.1f} %); the largest evidence was {most:.3g}, the limit is {LIMIT:.0g}"
    )
    shown = Table(title=f"requests until an alarm, after {before} calibrated ones ({total} streams each)")
    for heading in ("traffic", "median", "95 %", "most", "within 100"):
        shown.add_column(heading, justify="left" if heading == "traffic" else "right")
    for row in rows:
        shown.add_row(
            row["traffic"], f"{row['median']:.0f}", f"{row['p95']:.0f}", str(row["most"]),
            f"{100 * row['within_100']:.1f} %",
        )  # fmt: skip
    wide_console().print(shown)
    if json_path is not None:
        write_result(json_path, {
            "calibration_requests": calibration, "streams": total, "length": length, "false_alarms": alarms,
            "false_alarms_ci95": [low, high], "bound": bound, "largest_evidence": most, "limit": LIMIT,
            "before_change": before, "delays": rows,
        })  # fmt: skip


if __name__ == "__main__":
    run(app)
