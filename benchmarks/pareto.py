"""Every rule over a grid of its parameters, the learned arbiter over its threshold: accuracy, acceptance length.

The plot and the tuning of each rule use the calibration split; the table compares the rules as tuned on the test split,
all on the same problems. ``random`` keeps as many mismatches as the arbiter does: what noise at its rate would do.

    python benchmarks/pareto.py --artefact vllm_cospec/demo/arbiter --json benchmarks/results/pareto_demo.json
    python benchmarks/pareto.py --artefact vllm_cospec/demo/arbiter --rule ears --rule entropy --temperature 0.7
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run as run_command
from benchmarks.command import wide_console
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import policy_names
from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.measure.evaluate import evaluate, rows_of
from vllm_cospec.training.measure.modes import at_temperature, parse_mode
from vllm_cospec.training.measure.plots import plot_accuracy
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.measure.render import named, rich_table
from vllm_cospec.training.preflight import CALIBRATION_SEED
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.tasks import load_task

THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)


def grid(num_speculative_tokens: int) -> dict[str, list[str]]:
    """Return the settings of each rule, as modes; a rule without a grid of its own is tried as it is by default."""
    own = {
        "typical": [
            f"typical(posterior_threshold={e}, posterior_alpha={d})"
            for e in (0.005, 0.01, 0.02, 0.05, 0.09, 0.2, 0.3)
            for d in (0.1, 0.3, 1.0)
        ],
        "relaxed_topk": [
            f"relaxed_topk(top_n={n}, delta={d})" for n in (2, 3, 5, 10) for d in (0.3, 0.6, 0.8, 0.9, 0.95, 1.0)
        ],
        "threshold": [f"threshold(single={p})" for p in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)],
        "cascade": [f"cascade(alpha={a})" for a in (0.5, 0.8, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)],
        "mars": [f"mars(ratio={r})" for r in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)],
        "fly": [
            f"fly(entropy_threshold={h}, window={w})"
            for h in (0.02, 0.1, 0.3, 0.6)
            for w in (1, 2, 3, 4)
            if w < num_speculative_tokens
        ],
        "kl": [f"kl(max_kl={k})" for k in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0)],
        "fsd": [f"fsd(divergence=js, max_divergence={m})" for m in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.69)]
        + [f"fsd(divergence=tv, max_divergence={m})" for m in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)],
        "mixture": [f"mixture(weight={w})" for w in (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)],
        "entropy": [  # strict where nothing is sampled, as ears
            f"entropy(posterior_threshold={e}, posterior_alpha={a})"
            for e, a in ((0.95, 0.4), (0.95, 1.0), (0.95, 3.0), (0.5, 0.4), (0.2, 0.4))
        ],
        "ears": [f"ears(tolerance={t})" for t in (0.1, 0.3, 1.0)],
    }
    others = set(policy_names()) - own.keys() - {"strict", "learned", "random"}
    return own | {name: [name] for name in sorted(others)}


def beaten_by(rows: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """Return, for each rule, the learned setting with the most accuracy at the same or a longer acceptance length.

    None where no learned setting is more accurate there.
    """
    learned = {name: row for name, row in rows.items() if name.startswith("learned")}
    found: dict[str, str | None] = {}
    for name, row in rows.items():
        if name not in learned and not name.startswith("target"):
            better = [
                other
                for other, own in learned.items()
                if own["accuracy"] > row["accuracy"] and own["acceptance_length"] >= row["acceptance_length"]
            ]
            found[name] = max(better, key=lambda other: learned[other]["accuracy"], default=None)
    return found


def families(rows: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by policy; the target alone is none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        if not name.startswith("target"):
            found.setdefault(name.partition("(")[0], []).append(row)
    return found


def main(
    artefact: Annotated[Path, typer.Option(help="Directory of the trained arbiter.")],
    config: Annotated[Path, typer.Option(help="TOML file of the pair and the task.")] = DEMO_CONFIG,
    calibration: Annotated[int, typer.Option(help="Problems the rules are tuned on.")] = 500,
    problems: Annotated[int, typer.Option(help="Test problems.")] = 2000,
    seed: Annotated[int, typer.Option(help="Which test problems.")] = 2026,
    coarse: Annotated[bool, typer.Option("--coarse", help="Every other setting of each rule's grid.")] = False,
    rule: Annotated[
        list[str] | None, typer.Option(help="Only this rule, and others named so, beside the arbiter as it is served.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, a plot beside it.")] = None,
) -> None:
    """Compare the learned arbiter with every rule."""
    run = load_train_config(config)
    rollout = run.rollout
    task = load_task(run.task.name, **run.task.options)
    tune = task.problems(CALIBRATION_SEED, calibration, "calibration")
    test = task.problems(seed, problems, "test")
    every = 2 if coarse else 1
    every_rule = grid(run.pair.num_speculative_tokens)
    if unknown := set(rule or ()) - every_rule.keys():
        raise ConfigError(f"--rule: {unknown.pop()!r} is none of {', '.join(every_rule)}")
    settings = {family: own[::every] for family, own in every_rule.items() if family in (rule or every_rule)}
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    result: dict[str, Any] = {"complete": False}

    def publish(**figures: Any) -> None:
        """Write what there is: what took long is not lost when the rest fails."""
        result.update(figures)
        if json_path is not None:
            write_result(json_path, result)

    def measure(names: list[str], on: list[Any], title: str) -> dict[str, dict[str, Any]]:
        modes = at_temperature(list(map(parse_mode, names)), temperature, "sampled" if temperature else "greedy")
        with progress_bar(title, len(modes) * len(on)) as tick:
            rows = rows_of(evaluate(run.pair, run.task, rollout, modes, on, artefact, tick))
        return {row["mode"]: row for row in rows}

    names = [name for family in settings.values() for name in family]
    learned = ["learned", *(f"learned(threshold={t})" for t in THRESHOLDS[::every] if not rule)]
    others = ["strict"] if rule else ["target", "draft", "strict"]
    with engines_session(run):
        tuned = measure(["strict", *learned, *names], tune, "calibration problems")
        publish(calibration=tuned)
        if json_path is not None:
            title = f"{calibration} calibration problems, {how}, 95 % intervals"
            plot_accuracy(json_path.with_suffix(".png"), families(tuned), title=title)
        chosen = {family: max(own, key=lambda name: tuned[name]["accuracy"]) for family, own in settings.items()}
        control = f"random(rate={round(tuned['learned']['override_rate'], 3)})"
        rows = measure([*others, *learned, *chosen.values(), control], test, "test problems")
    console = wide_console()
    title = f"{problems} test problems, seed {seed}, {how}; rules as tuned on {calibration} calibration problems"
    console.print(rich_table(named(rows), title))
    beaten = {"test": beaten_by(rows), "calibration": beaten_by(tuned)}
    for where, own in beaten.items():
        losing = [name for name, better in own.items() if better is None]
        console.print(
            f"{where}: {len(own) - len(losing)} of {len(own)} settings lie below the learned curve"
            + (f"; not below it: {', '.join(losing)}" if losing else "")
        )
    publish(complete=True, problems=title, tuned=chosen, modes=rows, beaten_by=beaten)


if __name__ == "__main__":
    run_command(main)
