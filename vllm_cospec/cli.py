"""The ``cospec`` command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_cospec.errors import ConfigError, CoSpecError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Collaborative speculative decoding for vLLM.",
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check whether cospec works with the installed vLLM; exit code 1 when it does not."""
    from vllm_cospec.doctor import examine, show

    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console())
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def inspect(
    artefact: Annotated[Path, typer.Argument(help="Directory of an arbiter.")],
    as_json: Json = False,
) -> None:
    """Show what an arbiter is, what it was trained on, and its calibration curve."""
    from vllm_cospec.arbiter import load_artefact

    arbiter, config = load_artefact(artefact)
    if as_json:
        print(config.model_dump_json(by_alias=True, indent=2))
        return
    console = Console()
    facts = Table(show_header=False, title=str(artefact))
    made = config.provenance
    for name, value in (
        ("schema", f"{config.schema_id.name} v{config.schema_id.version} ({config.schema_id.hash})"),
        ("draft logits", "yes" if config.schema_id.draft_logits else "no"),
        (
            "network",
            f"16 - {' - '.join(map(str, config.hidden_sizes))} - 1, "
            f"{sum(p.numel() for p in arbiter.parameters())} weights",
        ),
        ("threshold", f"{config.threshold:g}"),
        ("target", made.target or "not recorded"),
        ("draft", made.draft or "not recorded"),
        ("vocabulary", f"{made.vocab_size} tokens, tokenizer {made.tokenizer_hash}"),
        ("created", made.created or "not recorded"),
        ("git", made.git_sha or "not recorded"),
    ):
        facts.add_row(name, value)
    console.print(facts)
    if made.results:
        from vllm_cospec.training.measure.render import named, rich_table

        facts = Table("result", "value", title="measured")
        for name, value in made.results.items():
            if isinstance(value, dict) and "modes" in value:
                console.print(rich_table(named(value["modes"]), f"{name}: {value['problems']}"))
            else:
                facts.add_row(name, json.dumps(value))
        if facts.rows:
            console.print(facts)
    if config.calibration:
        title = f"calibration on {config.calibration[0].num_problems} problems"
        if config.statement is not None:
            said = config.statement
            title += (
                f", loss bounded with {said.level:.0%} confidence at temperature {said.conditions.temperature[0]:g}"
            )
        curve = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns
        for heading in (
            "threshold", "accuracy", "difference\nto target", "95 %", "loss\nbelow", "accept-\nance\nlength",
            "over-\nride\nrate",
        ):  # fmt: skip
            curve.add_column(heading, justify="right", no_wrap=True)
        for point in config.calibration:
            low, high = point.accuracy_difference_ci95
            curve.add_row(
                f"{point.threshold:g}",
                f"{point.accuracy:.3f}",
                f"{point.accuracy_difference:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                "" if point.loss_bound is None else f"{point.loss_bound:.4f}",
                f"{point.acceptance_length:.2f}",
                f"{point.override_rate:.2f}",
            )
        console.print(curve)
    else:
        console.print("no calibration curve")


@app.command()
def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Only serve the bundled pair, until stopped.")] = False,
    port: Annotated[int, typer.Option(help="Port of --serve.", min=1, max=65535)] = 8000,
    problems: Annotated[int, typer.Option(help="How many held-out problems to ask in each mode.", min=4)] = 400,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the comparison to this file.")] = None,
) -> None:
    """Serve the bundled pair, ask it held-out problems strictly and with arbitration, and compare."""
    from vllm_cospec.training.measure.demonstration import run_demo, serve_demo

    if serve:
        raise typer.Exit(serve_demo(port))
    run_demo(problems, json_path, Console())


ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; left out: that of the bundled pair.")]


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="TOML file, see training/configs and docs/training.md.")],
    output: Annotated[Path | None, typer.Option(help="Directory for checkpoints, logs, plots and the arbiter.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that directory.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Check the run and say what it will do; train nothing.")] = False,
    probe: Annotated[
        int, typer.Option(min=0, help="Problems that --plan has one engine answer, to estimate the cost; 0 for none.")
    ] = 0,
) -> None:
    """Train an arbiter for a pair of models by reinforcement learning, and calibrate it."""
    commands = _training_commands()
    if plan:
        commands.show_plan(config, probe, Console())
        return
    if output is None:
        raise ConfigError("--output: missing; name a directory for the run, or pass --plan")
    try:
        commands.train(config, output, resume, Console())
    except KeyboardInterrupt as stopped:  # typer would end without a word
        reason = str(stopped) or f"stopped; continue with --resume (checkpoints are in {output})"
        Console(stderr=True).print(f"cospec: {reason}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(130) from None


@app.command()
def calibrate(
    artefact: Annotated[Path, typer.Argument(help="Directory of an arbiter; its curve and threshold are replaced.")],
    config: ConfigOption = None,
    draft: Annotated[str | None, typer.Option(help="Another draft: directory or hub id.")] = None,
    num_speculative_tokens: Annotated[int | None, typer.Option(help="Another K.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Another dtype of the models.")] = None,
    temperature: Annotated[float | None, typer.Option(help="The one that will be served; 0 is greedy.")] = None,
    problems: Annotated[int | None, typer.Option(help="Problems of the calibration split.")] = None,
    level: Annotated[float | None, typer.Option(help="Confidence of the bounds.")] = None,
    max_accuracy_loss: Annotated[float | None, typer.Option(help="Loss the chosen threshold keeps.")] = None,
) -> None:
    """Measure what each threshold does on held-out problems, bound what it loses, and choose one."""
    from vllm_cospec.arbiter import load_artefact
    from vllm_cospec.training.config import load_train_config

    load_artefact(artefact)
    commands = _training_commands()
    served = commands.as_served(
        load_train_config(config or commands.DEMO_CONFIG),
        pair={"draft": draft, "num_speculative_tokens": num_speculative_tokens, "dtype": dtype},
        calibration={
            "temperature": temperature, "problems": problems, "level": level, "max_accuracy_loss": max_accuracy_loss,
        },
    )  # fmt: skip
    commands.calibrate_artefact(artefact, served, Console())


@app.command()
def evaluate(
    mode: Annotated[
        list[str],
        typer.Option(help="target, draft, strict, learned, learned(threshold=0.6), cascade(alpha=0.95), ...; repeat."),
    ],
    config: ConfigOption = None,
    artefact: Annotated[Path | None, typer.Option(help="Directory of a trained arbiter, for learned.")] = None,
    problems: Annotated[int, typer.Option(min=2, help="Number of problems.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which of the split's problems.")] = 2026,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    per_question: Annotated[Path | None, typer.Option(help="Write every answer to this JSONL file.")] = None,
    record: Annotated[str | None, typer.Option(help="Write the table into the artefact under this name.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of all modes; 0 is greedy.")] = 0.0,
    baseline: Annotated[
        str, typer.Option(help="What is compared with at a temperature: the target's greedy or sampled answers.")
    ] = "greedy",
    split: Annotated[str, typer.Option(help="Which problems: test, or calibration to choose among rules.")] = "test",
) -> None:
    """Compare modes on the same problems: accuracy with intervals, paired with the target, acceptance length."""
    from vllm_cospec.training.config import load_train_config

    commands = _training_commands()
    commands.run_evaluation(
        load_train_config(config or commands.DEMO_CONFIG),
        artefact, mode, problems, seed, json_path, per_question, record, temperature, baseline, split, Console(),
    )  # fmt: skip


def _training_commands() -> Any:
    try:
        from vllm_cospec.training import commands
    except ModuleNotFoundError as error:
        raise CoSpecError(f"{error.name}: not installed; pip install 'vllm-cospec[train]'") from None
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a reward "module:function" may lie here; Ray does the same for its workers
    return commands


def main() -> None:
    """Run the command; what a user got wrong is one line, not a traceback."""
    try:
        app()
    except (CoSpecError, OSError) as error:
        Console(stderr=True).print(f"cospec: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("cospec: interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
