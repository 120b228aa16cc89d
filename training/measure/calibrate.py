"""Calibration: what each threshold does on held-out problems, and the artefact that carries it."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, CurvePoint, load_artefact, save_artefact
from vllm_cospec.training.config import CalibrationConfig, PairConfig, RolloutConfig, TaskConfig
from vllm_cospec.training.measure.evaluate import Mode, evaluate, summaries
from vllm_cospec.training.rollout.engine import artefact_config
from vllm_cospec.training.tasks import load_task

SEED = 77  # of the calibration problems; the split is theirs alone
PACKAGES = ("vllm-cospec", "vllm", "torch", "transformers", "ray")
SPEED_WEIGHT = 0.02


def save_uncalibrated(
    directory: Path, arbiter: Arbiter, pair: PairConfig, training_config: dict[str, Any], results: dict[str, Any]
) -> None:
    """Write an arbiter with a threshold of 0.5 and no curve."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    config = artefact_config(
        pair, arbiter.hidden_sizes, training_config=training_config, git_sha=git_sha(), packages=packages,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), results=results,
    )  # fmt: skip
    save_artefact(directory, arbiter, config, model_card(config))


def calibrate(
    directory: Path,
    pair: PairConfig,
    task: TaskConfig,
    rollout: RolloutConfig,
    calibration: CalibrationConfig,
    tick: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the thresholds, choose one, and write curve and choice into the artefact. Needs a Ray session.

    The chosen threshold is the one with the most accuracy, where a gain in speed counts as little as in training. The
    target's own accuracy is that of strict verification, which emits the target's tokens.

    Args:
        directory: the artefact.
        pair, task, rollout, calibration: of the run.
        tick: called with the number of answers that have arrived.

    Returns:
        The summary of strict, and of each threshold.
    """
    problems = load_task(task.name, **task.options).problems(SEED, calibration.problems, "calibration")
    strict = Mode("strict", "learned", extra={"cospec_policy": "strict"})
    modes = {
        threshold: Mode(f"learned(threshold={threshold:g})", "learned", extra={"cospec_threshold": threshold})
        for threshold in sorted(set(calibration.thresholds))
    }
    rows = summaries(evaluate(pair, task, rollout, [strict, *modes.values()], problems, directory, tick))
    curve, points = [], []
    for threshold, mode in modes.items():
        summary = rows[mode.name]
        paired = summary["paired_vs_target"]
        points.append({"threshold": threshold, **summary})
        curve.append(
            CurvePoint(
                threshold=threshold,
                accuracy=min(1.0, max(0.0, summary["accuracy"])),
                accuracy_difference=paired["difference"],
                accuracy_difference_ci95=tuple(paired["ci95"]),
                acceptance_length=summary["acceptance_length"],
                override_rate=summary["override_rate"],
                num_problems=len(problems),
            )
        )
    best = max(curve, key=lambda point: point.accuracy + SPEED_WEIGHT * (1 - 1 / point.acceptance_length))
    arbiter, config = load_artefact(directory)
    config = config.model_copy(update={"threshold": best.threshold, "calibration": tuple(curve)})
    save_artefact(directory, arbiter, config, model_card(config))
    return rows["strict"], points


def record_results(directory: Path, results: dict[str, Any]) -> None:
    """Write measured results into an artefact and its model card."""
    arbiter, config = load_artefact(directory)
    provenance = config.provenance.model_copy(update={"results": {**config.provenance.results, **results}})
    config = config.model_copy(update={"provenance": provenance})
    save_artefact(directory, arbiter, config, model_card(config))


def model_card(config: ArtefactConfig) -> str:
    """Return the artefact's README."""
    made = config.provenance
    lines = [
        f"# Arbiter for {made.target} with {made.draft}",
        "",
        "Decides, where draft and target of speculative decoding disagree, whose token to keep. For vllm-cospec.",
        "Verification with it is lossy: output can differ from the target's.",
        "",
        f"- Network: 16 - {' - '.join(map(str, config.hidden_sizes))} - 1; threshold {config.threshold:g}.",
        f"- Statistics: {config.schema_id.name} v{config.schema_id.version}"
        f"{'' if config.schema_id.draft_logits else ', without draft logits'}.",
        f"- Vocabulary: {made.vocab_size} tokens, tokenizer {made.tokenizer_hash}.",
        f"- Made {made.created or 'at an unrecorded time'} with "
        f"{', '.join(f'{name} {number}' for name, number in made.packages.items()) or 'unrecorded packages'}.",
    ]
    if config.calibration:
        n = config.calibration[0].num_problems
        lines += [
            "",
            f"## Calibration ({n} problems of the calibration split, greedy)",
            "",
            "| threshold | accuracy | difference to target (95 %) | acceptance length | override rate |",
            "|---|---|---|---|---|",
        ]
        for point in config.calibration:
            low, high = point.accuracy_difference_ci95
            lines.append(
                f"| {point.threshold:g} | {point.accuracy:.3f} | {point.accuracy_difference:+.3f} ({low:+.3f} to "
                f"{high:+.3f}) | {point.acceptance_length:.2f} | {point.override_rate:.2f} |"
            )
    for name, table in made.results.items():
        if isinstance(table, dict) and "modes" in table:
            lines += ["", f"## {name} ({table['problems']})", "", f"`{table['command']}`", ""]
            lines.append("| mode | accuracy (95 %) | vs target | p | acceptance length | override rate |")
            lines.append("|---|---|---|---|---|---|")
            for mode, row in table["modes"].items():
                low, high = row["accuracy_ci95"]
                paired = row.get("paired_vs_target")
                lines.append(
                    f"| {mode} | {100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) | "
                    + (f"{100 * paired['difference']:+.1f} | {paired['p_value']:.1g}" if paired else " | ")
                    + f" | {row['acceptance_length']:.2f} | {row['override_rate']:.2f} |"
                )
    if made.training_config:
        lines += ["", "## Training configuration", "", "```json", json.dumps(made.training_config, indent=2), "```"]
    return "\n".join(lines) + "\n"


def git_sha() -> str:
    """Return the commit of this package's source tree, with a mark when it has changes; empty outside of one."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return sha + ("+" if changed else "")
