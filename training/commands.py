"""What ``cospec train``, ``calibrate`` and ``evaluate`` do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError
from rich.console import Console

from vllm_cospec.arbiter import Arbiter, load_artefact
from vllm_cospec.atomic import write_text
from vllm_cospec.errors import ConfigError, CoSpecError, TrainingError, first_sentence
from vllm_cospec.training.artefact import portable
from vllm_cospec.training.config import TrainConfig, load_train_config, require_models
from vllm_cospec.training.measure.calibrate import calibrate, conclusion
from vllm_cospec.training.measure.card import record_results, save_uncalibrated
from vllm_cospec.training.measure.evaluate import evaluate, rows_of
from vllm_cospec.training.measure.modes import at_temperature, parse_mode
from vllm_cospec.training.measure.plots import plot_accuracy
from vllm_cospec.training.measure.provenance import command_line, write_result
from vllm_cospec.training.measure.render import CALIBRATED, rich_table
from vllm_cospec.training.measure.report import plot_learning
from vllm_cospec.training.plan import plan, table
from vllm_cospec.training.preflight import calibration_problems, test_problems
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.tasks import FurtherFigures, Split, digest
from vllm_cospec.training.trainer import FAILURES, RAY_LOGS, Trainer

ARBITER = "arbiter"


class Interrupted(KeyboardInterrupt):
    """A run that a user stopped; the message says how to go on."""


DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.toml"


def train(config_file: Path, output: Path, resume: bool, console: Console) -> Path:
    """Train, calibrate, draw; returns the artefact's directory."""
    config = load_train_config(config_file)
    try:
        return _train(Trainer(config, output, resume, notice), console)
    except OSError as error:
        raise TrainingError(f"{output}: {error}; the last checkpoint is intact, continue with --resume") from None


def show_plan(config_file: Path, probe: int, console: Console) -> None:
    """Check a run, and print what it will do and what it is estimated to cost."""
    config = load_train_config(config_file)
    console.print(table(config, *plan(config, probe, notice)))


def notice(text: str) -> None:
    """Say something that is no result, on standard error."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _train(trainer: Trainer, console: Console) -> Path:
    config, output = trainer.config, trainer.output
    try:
        trainer.run()
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after update {trainer.updates} of {config.iterations}; continue with --resume (checkpoints are "
            f"in {output})"
        ) from None
    artefact, tally = output / ARBITER, trainer.tally
    totals = {name: round(value, 1) for name, value in tally.totals.items()}
    totals["idle_share"] = round(tally.idle_share, 4)
    totals["idle_share_with_start"] = round(tally.idle_share_with_start, 4)
    update, arbiter = trainer.shipped()
    totals["shipped_update"] = update
    if not holds(artefact, arbiter):  # one that does stays, with its curve, until there is another curve
        save_uncalibrated(artefact, arbiter, config.pair, portable(config), {"training": totals})
    plot_learning(output)
    calibrate_artefact(artefact, config, console)
    console.print(
        f"{tally['responses']:.0f} responses and {tally['branches']:.0f} branches in {tally['seconds'] / 60:.1f} "
        f"minutes; {100 * tally.idle_share:.1f} % of the actors' time was not spent generating, "
        f"{100 * tally.idle_share_with_start:.1f} % with the {tally['start_seconds']:.0f} seconds in which the engines "
        f"started"
    )
    if tally["grader_failures"]:
        console.print(f"{tally['grader_failures']:.0f} answers could not be graded and scored 0, see {FAILURES}")
    console.print(f"arbiter, as it was after update {update}: {artefact}", soft_wrap=True)
    return artefact


def holds(artefact: Path, arbiter: Arbiter) -> bool:
    """Whether a directory has an artefact with an arbiter's weights."""
    try:
        found = load_artefact(artefact)[0].state_dict()
    except CoSpecError:
        return False
    weights = arbiter.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def as_served(config: TrainConfig, pair: dict[str, Any], calibration: dict[str, Any]) -> TrainConfig:
    """Return the configuration for another draft, K, dtype, temperature, ...

    Args:
        config: of a training run.
        pair: changes of the pair, ``dtype`` among them; None leaves a setting as it is.
        calibration: changes of the calibration, likewise.

    Raises:
        ConfigError: names the field, the value and the way out.
    """
    found = config.model_dump()
    changes = {key: value for key, value in pair.items() if value is not None}
    if "dtype" in changes:
        found["pair"]["engine"] |= {"dtype": changes.pop("dtype")}
    found["pair"] |= changes
    found["calibration"] |= {key: value for key, value in calibration.items() if value is not None}
    try:
        return TrainConfig.model_validate(found)
    except ValidationError as error:
        raise ConfigError(first_sentence(error, "calibrate")) from None


def calibrate_artefact(artefact: Path, config: TrainConfig, console: Console) -> None:
    """Measure thresholds, write the curve into the artefact, draw it beside the artefact."""
    calibration = config.calibration
    questions = calibration_problems(config, notice)
    with (
        engines_session(config, notice, artefact.parent / RAY_LOGS),
        progress_bar("calibrating", calibration.problems) as tick,
    ):
        strict, *rows = calibrate(artefact, config, questions, tick)
    console.print(rich_table([strict, *rows], f"{calibration.problems} calibration problems", CALIBRATED))
    plot_accuracy(
        artefact.parent / "thresholds.png", {"arbiter, by threshold": rows, "strict": [strict]},
        labels="threshold", level=strict["accuracy"],
    )  # fmt: skip
    found = conclusion([strict, *rows], calibration.max_accuracy_loss, calibration.level)
    console.print(found, markup=False, highlight=False, soft_wrap=True)


def run_evaluation(
    config: TrainConfig,
    artefact: Path | None,
    modes: Sequence[str],
    num_problems: int,
    seed: int,
    json_path: Path | None,
    per_question: Path | None,
    record: str | None,
    temperature: float,
    baseline: str,
    split: Split,
    console: Console,
) -> dict[str, Any]:
    """Evaluate modes on problems of a split; prints a table, returns the figures."""
    require_models(config.pair)
    if artefact is not None:
        load_artefact(artefact)  # a damaged one is refused before engines start
    for path in (json_path, per_question):  # hours later would be too late
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if split not in get_args(Split):
        raise ConfigError(f"--split: {split!r} is none of {', '.join(get_args(Split))}")
    if record and artefact is None:
        raise ConfigError("--record: needs the artefact to write to; pass --artefact")
    parsed = [parse_mode(text, artefact is not None) for text in dict.fromkeys(modes)]
    parsed = at_temperature(parsed, temperature, baseline)
    source = Problems(config.pair, config.task, config.rollout)
    task, problems = source.task, test_problems(config, source, seed, num_problems, split, notice)
    with (
        engines_session(config, notice),
        progress_bar("evaluating", num_problems * len(parsed)) as tick,
    ):
        answers = evaluate(config.pair, config.task, config.rollout, parsed, problems, artefact, tick)
    rows = rows_of(answers)
    if isinstance(task, FurtherFigures):
        for row in rows:
            row.update(task.figures(problems, answers[row["mode"]].texts))
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    title = f"{num_problems} {split} problems of {config.task.name}, seed {seed}, {how}"
    console.print(rich_table(rows, title))
    for mode, own in answers.items():
        if own.outcome.failures:
            console.print(f"{mode}: {len(own.outcome.failures)} answers could not be graded and scored 0; the first: "
                          f"{own.outcome.failures[0]}", markup=False)  # fmt: skip
    result = {
        "command": command_line(), "problems": title, "problems_sha256": digest(problems),
        "modes": {row["mode"]: row for row in rows},
    }  # fmt: skip
    if json_path is not None:
        write_result(json_path, result)
    if per_question is not None:
        by_problem = zip(*(own.entries(mode, problems) for mode, own in answers.items()), strict=True)
        write_text(per_question, "".join(json.dumps(entry) + "\n" for entries in by_problem for entry in entries))
    if record and artefact is not None:
        record_results(artefact, {record: result})
    return result
