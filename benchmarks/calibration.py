"""Does a bound of the loss hold? Calibration repeated on thousands of sets from populations whose truth is known.

A rule looks at one calibration set and chooses a threshold; its statement is broken where the threshold it chose truly
loses more than the margin. Compared: the fixed sequence of exact tests that ``cospec calibrate`` uses, the same
sequence with other tests, pointwise intervals over the whole grid (what ``max_accuracy_loss`` read until version 0.2),
and the best point of the curve (what training shipped until then).

    python benchmarks/calibration.py answers --task sums --output benchmarks/results/answers_sums.json
    python benchmarks/calibration.py lines runs/natural/test --output benchmarks/results/answers_code.json
    python benchmarks/calibration.py simulate benchmarks/results/answers_*.json --json FILE
"""

from __future__ import annotations

import bisect
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from scipy.stats import binom

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run, several, wide_console
from benchmarks.natural import BASELINE, outcomes
from benchmarks.populations import Population, flat, load, of_lines, of_sweep, save
from vllm_cospec.training.config import bundled, load_train_config
from vllm_cospec.training.measure.fixed_sequence import threshold_sequence
from vllm_cospec.training.measure.intervals import Z, wilson_interval
from vllm_cospec.training.measure.modes import parse_mode
from vllm_cospec.training.measure.noninferiority import betting_p_value, exact_p_value, score_statistic
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.measure.thresholds import sweep

LEVEL = 0.95
SETS_BY_BETTING = 2000  # that test looks at every single problem
Passed = Callable[[Population, np.ndarray, int, float], np.ndarray]
"""(population, sets [S, P], problems in a set, margin) -> which thresholds pass, bool [S, T]; strict always does."""

app = several(__doc__)


def pairs(population: Population, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many problems each threshold gains and loses against strict in each set, int64 [S, T] each."""
    difference = population.scores - population.scores[:, :1]
    return sets @ (difference > 0).astype(np.int64), sets @ (difference < 0).astype(np.int64)


def sequence(passed: np.ndarray) -> np.ndarray:
    """A threshold passes in a fixed sequence when all before it pass too: bool [S, T]."""
    return np.logical_and.accumulate(passed, axis=1)


def exact(population: Population, sets: np.ndarray, n: int, margin: float) -> np.ndarray:
    """The exact test of each threshold by itself. Its p-value grows with its statistic, so that it is bisected."""
    gained, lost = pairs(population, sets)
    statistics = score_statistic(gained.astype(float), lost.astype(float), n, margin)
    tables = {
        round(float(s), 9): (int(g), int(c)) for s, g, c in zip(statistics.flat, gained.flat, lost.flat, strict=True)
    }
    ordered = sorted(tables)
    last = bisect.bisect_right(ordered, 1 - LEVEL, key=lambda s: exact_p_value(*tables[s], n, margin))
    return _with_strict(statistics <= (ordered[last - 1] + 1e-9 if last else -np.inf))


def bonferroni(population: Population, sets: np.ndarray, n: int, margin: float) -> np.ndarray:
    """The exact test of each threshold at a level divided by their number."""
    gained, lost = pairs(population, sets)
    level = (1 - LEVEL) / (population.scores.shape[1] - 1)
    tested = {pair: exact_p_value(*pair, n, margin) <= level for pair in set(zip(gained.flat, lost.flat, strict=True))}
    return _with_strict(np.vectorize(lambda g, c: tested[g, c])(gained, lost))


def hoeffding_bentkus(population: Population, sets: np.ndarray, n: int, margin: float) -> np.ndarray:
    """The test that Learn then Test proposes for any bounded loss, here (1 + strict's score - ours) / 2."""
    difference = (population.scores[:, :1] - population.scores).T @ sets.T / n
    risk, null = (1 + difference.T) / 2, (1 + margin) / 2
    below = np.clip(risk, 1e-12, null)
    hoeffding = np.exp(-n * (below * np.log(below / null) + (1 - below) * np.log((1 - below) / (1 - null))))
    bentkus = np.e * binom.cdf(np.ceil(n * risk), n, null)
    return _with_strict(np.minimum(hoeffding, bentkus) <= 1 - LEVEL)


def betting(population: Population, sets: np.ndarray, n: int, margin: float) -> np.ndarray:
    """The test by betting, on the problems in random order; only for the first ``SETS_BY_BETTING`` sets."""
    difference, rng = population.scores - population.scores[:, :1], np.random.default_rng(0)
    passed = np.zeros((min(len(sets), SETS_BY_BETTING), difference.shape[1]), bool)
    for s, counts in enumerate(sets[:SETS_BY_BETTING]):
        kinds = np.repeat(np.arange(len(counts)), counts)
        rng.shuffle(kinds)
        for t in range(1, difference.shape[1]):
            passed[s, t] = betting_p_value(difference[kinds, t], margin, LEVEL) <= 1 - LEVEL
            if not passed[s, t]:
                break  # the sequence ends here
    return _with_strict(passed)


def pointwise(population: Population, sets: np.ndarray, n: int, margin: float) -> np.ndarray:
    """The two-sided 95 % interval of each threshold (Agresti and Min), as if it were the only one."""
    difference = population.scores - population.scores[:, :1]
    total, squares = sets @ difference, sets @ difference**2 + 1.0
    adjusted = total / (n + 2)
    half = Z * np.sqrt(np.maximum(0.0, squares / (n + 2) - adjusted**2) / (n + 2))
    return _with_strict(-np.minimum(total / n, adjusted - half) < margin)


def _with_strict(passed: np.ndarray) -> np.ndarray:
    passed = passed.copy()
    passed[:, 0] = True
    return passed


RULES: dict[str, Passed] = {
    "fixed sequence, exact tests": lambda *given: sequence(exact(*given)),
    "fixed sequence, betting": lambda *given: sequence(betting(*given)),
    "fixed sequence, Hoeffding-Bentkus": lambda *given: sequence(hoeffding_bentkus(*given)),
    "Bonferroni, exact tests": bonferroni,
    "pointwise intervals": pointwise,
}


def best_point(population: Population, sets: np.ndarray, n: int) -> np.ndarray:
    """The most accurate threshold but strict, speed counting for 0.02 as it did: index [S]."""
    accuracy = sets @ population.scores / n
    return 1 + (accuracy + 0.02 * (1 - 1 / population.acceptance_length))[:, 1:].argmax(axis=1)


def outcome(population: Population, chosen: np.ndarray, margin: float) -> dict[str, Any]:
    """Return how often a rule's choices, index [S], break the bound, and what they are worth."""
    broken = population.loss[chosen] > margin
    return {
        "sets": len(chosen),
        "broken": float(broken.mean()),
        "broken_ci95": list(wilson_interval(int(broken.sum()), len(chosen))),
        "strict": float((chosen == 0).mean()),
        "mean_loss": float(population.loss[chosen].mean()),
        "acceptance_length": float(population.acceptance_length[chosen].mean()),
    }


def margins(population: Population, wanted: list[float]) -> list[float]:
    """The margins that are asked for, and the hardest ones: just below what a threshold truly loses."""
    hardest = {round(float(loss) - 0.5 / float(population.problems.sum()), 9) for loss in population.loss}
    return sorted({*wanted, *(margin for margin in hardest if 0.001 <= margin <= 0.2)})


def compare(population: Population, n: int, sets: int, margin: float, seed: int) -> list[dict[str, Any]]:
    """Return a row for every rule on the same sets."""
    drawn = population.draw(sets, n, seed)
    tests = {name: rule for name, rule in RULES.items() if _binary(population) or "exact" not in name}
    longest = {  # the fastest threshold that passes, as max_accuracy_loss takes it
        name: np.where(rule(population, drawn, n, margin), population.acceptance_length, -1.0).argmax(axis=1)
        for name, rule in tests.items()
    }
    rows = {**longest, "best point": best_point(population, drawn, n)}
    found = {"population": population.name, "problems": n, "margin": margin}
    return [{**found, "rule": name, **outcome(population, chosen, margin)} for name, chosen in rows.items()]


def _binary(population: Population) -> bool:
    return bool(np.isin(population.scores, (0, 1)).all())


def splits(population: Population, parts: int, margin: float, seed: int) -> list[dict[str, Any]]:
    """Calibrate on half of each disjoint part of the problems, and look at the other half."""
    rows = []
    halves = population.split(2 * parts, seed)
    for own, test in zip(halves[::2], halves[1::2], strict=True):
        n = int(own.sum())
        passed = sequence(exact(population, own[None], n, margin))
        chosen = int(np.where(passed[0], population.acceptance_length, -1.0).argmax())
        gained, lost = (int(count[0, chosen]) for count in pairs(population, test[None]))
        rows.append({
            "margin": margin, "problems": n, "threshold": population.thresholds[chosen],
            "test_problems": int(test.sum()), "test_gained": gained, "test_lost": lost,
            "test_loss": (lost - gained) / int(test.sum()), "true_loss": float(population.loss[chosen]),
            "acceptance_length": float(population.acceptance_length[chosen]),
        })  # fmt: skip
    return rows


@app.command()
def answers(
    output: Annotated[Path, typer.Option(help="Write the scores here.")],
    task: Annotated[
        str, typer.Option(help="demo, or sums: the same without products, which the target knows.")
    ] = "demo",
    problems: Annotated[int, typer.Option(min=100, help="Problems.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 2027,
) -> None:
    """Answer problems with the bundled pair and its arbiter at every threshold."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm_cospec.training.rollout.engine import Engine, Request
    from vllm_cospec.training.tasks import Problem, load_task
    from vllm_cospec.training.tasks.demo import draw_expression

    config = load_train_config(Path(__file__).parents[1] / "training/configs/demo.toml")
    demo = load_task("demo")
    asked = demo.problems(seed, problems, "test")
    if task == "sums":
        rng = random.Random(seed)
        found: dict[str, str] = {}
        while len(found) < problems:
            expression = draw_expression(rng, num_terms=3, product_share=0.0)
            found[expression.prompt] = expression.solution.rpartition("#")[2]
        asked = [Problem(prompt, answer) for prompt, answer in found.items()]
    arbiter = {"policy": "learned", "artefact": str(bundled("target").parent / "arbiter")}
    engine = Engine(config.pair, arbiter)
    requests = [Request(engine.encode(problem.prompt), config.rollout.max_tokens, 0) for problem in asked]
    thresholds = threshold_sequence([0.02, 0.005, 0.002, 0.0005, 0.0002, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answers", total=len(asked) * len(thresholds))
        found_sweep = sweep(
            engine.run, requests, thresholds, lambda i, text: demo.score(asked[i], text),
            lambda count: progress.advance(bar, count),
        )  # fmt: skip
    save(
        output, of_sweep(f"bundled pair, {task}", found_sweep), task=task, seed=seed, problems=problems,
        responses=len(found_sweep.score),
    )  # fmt: skip


@app.command()
def lines(
    work: Annotated[Path, typer.Argument(help="Answers of `python -m benchmarks.natural answers`.")],
    output: Annotated[Path, typer.Option(help="Write the scores here.")],
    arbiter: Annotated[str, typer.Option(help="Which arbiter's thresholds.")] = "text",
    unread: Annotated[bool, typer.Option("--unread", help="Only lines the draft has not read.")] = False,
) -> None:
    """Take the lines of a code base that were answered at several thresholds as a population."""
    _, kept = outcomes(work)
    found = {1.0: kept[BASELINE]}
    for mode, rows in kept.items():
        name, _, rest = mode.rpartition(": ")
        if name == arbiter and "threshold" in (settings := parse_mode(rest).settings):
            found[settings["threshold"]] = rows
    if unread:
        found = {threshold: [row for row in rows if row["new"]] for threshold, rows in found.items()}
    name = "code pair, lines the draft has not read" if unread else "code pair"
    save(output, of_lines(name, found), work=work.name, arbiter=arbiter, problems=len(found[1.0]))


@app.command()
def simulate(
    files: Annotated[list[Path], typer.Argument(help="What `answers` or `lines` wrote.")],
    problems: Annotated[list[int], typer.Option(help="Problems of a calibration set.")] = [500, 1000],  # noqa: B006
    sets: Annotated[int, typer.Option(min=100, help="Calibration sets.")] = 4000,
    margin: Annotated[list[float], typer.Option(help="Accepted losses.")] = [0.005, 0.01, 0.02],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the sets.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, a plot beside it.")] = None,
) -> None:
    """Calibrate again and again, and count how often what was said is not true."""
    populations = [load(path) for path in files]
    populations += [flat(10, 0.0101, 0.05), flat(10, 0.0101, 0.05, credit=0.5)]
    cases = [(own, n, m) for own in populations for n in problems for m in margins(own, margin)]
    rows = [
        row
        for own, n, m in track(cases, description="simulating", console=Console(stderr=True))
        for row in compare(own, n, sets, m, seed)
    ]
    wide_console().print(table(rows))
    if json_path is not None:
        write_result(json_path, {"level": LEVEL, "sets": sets, "seed": seed, "rows": rows})
        plot(json_path.with_suffix(".png"), rows)


@app.command()
def split(
    files: Annotated[list[Path], typer.Argument(help="What `answers` or `lines` wrote.")],
    parts: Annotated[int, typer.Option(min=2, help="Disjoint splits.")] = 20,
    margin: Annotated[list[float], typer.Option(help="Accepted losses.")] = [0.01, 0.05, 0.1],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Calibrate on half of each of some disjoint parts of the real answers, and look at the other half."""
    by_split = {own.name: [row for m in margin for row in splits(own, parts, m, seed)] for own in map(load, files)}
    for name, every in by_split.items():
        for m in margin:
            own = [row for row in every if row["margin"] == m]
            loss = [row["test_loss"] for row in own]
            wide_console().print(
                f"{name}, {len(own)} disjoint splits of {own[0]['problems']} and {own[0]['test_problems']} problems, "
                f"margin {m}: strict {sum(row['threshold'] == 1 for row in own)} times, loss on the test half "
                f"{min(loss):+.4f} to {max(loss):+.4f}, truly lost more: {sum(row['true_loss'] > m for row in own)}"
            )
    if json_path is not None:
        write_result(json_path, {"level": LEVEL, "seed": seed, "splits": by_split})


def table(rows: list[dict[str, Any]]) -> Table:
    """Show, for each rule, population and size of a set, the margin at which it is broken most often."""
    shown = Table(title=f"how often the bound is broken ({1 - LEVEL:.0%} is what it may be)")
    for heading in ("population", "problems", "rule", "worst margin", "broken (95 %)", "strict", "acceptance length"):
        shown.add_column(heading, justify="right" if heading in ("problems", "strict") else "left")
    for row in _worst(rows):
        low, high = row["broken_ci95"]
        shown.add_row(
            row["population"], str(row["problems"]), row["rule"], f"{row['margin']:.4f}",
            f"{100 * row['broken']:.1f} % ({100 * low:.1f} to {100 * high:.1f})", f"{100 * row['strict']:.0f} %",
            f"{row['acceptance_length']:.3f}",
        )  # fmt: skip
    return shown


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw how often each rule is broken, at the margin that is worst for it, beside the 5 % it may be."""
    from matplotlib.figure import Figure

    worst = _worst(rows)
    groups = list(dict.fromkeys((row["population"], row["problems"]) for row in worst))
    rules = list(dict.fromkeys(row["rule"] for row in worst))
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for i, rule in enumerate(rules):
        own = [(groups.index((r["population"], r["problems"])), r["broken"]) for r in worst if r["rule"] == rule]
        axes.bar([x + (i - len(rules) / 2) * 0.13 for x, _ in own], [100 * y for _, y in own], width=0.13, label=rule)
    axes.axhline(100 * (1 - LEVEL), linestyle=":", color="black")
    axes.set_xticks(range(len(groups)), [f"{name}\n{n} problems" for name, n in groups], fontsize=8)
    axes.set(ylabel="bound broken, % of the sets", title="at the margin that is worst for each rule")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["population"], row["problems"], row["rule"]
        if key not in found or row["broken"] > found[key]["broken"]:
            found[key] = row
    return list(found.values())


if __name__ == "__main__":
    run(app)
