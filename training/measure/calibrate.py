"""Calibration: what each threshold does on held-out problems, and which one is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_cospec.arbiter import CurvePoint, load_artefact, save_artefact
from vllm_cospec.training.config import CalibrationConfig, PairConfig, RolloutConfig, TaskConfig
from vllm_cospec.training.measure.card import model_card
from vllm_cospec.training.measure.evaluate import evaluate, rows_of
from vllm_cospec.training.measure.modes import parse_mode
from vllm_cospec.training.tasks import load_task

SEED = 77  # of the calibration problems; the split is theirs alone
SPEED_WEIGHT = 0.02


def calibrate(
    directory: Path,
    pair: PairConfig,
    task: TaskConfig,
    rollout: RolloutConfig,
    calibration: CalibrationConfig,
    tick: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Measure the thresholds, choose one, and write curve and choice into the artefact. Needs a Ray session.

    The chosen threshold is the one with the most accuracy, where a gain in speed counts as little as in training. The
    target's own accuracy is that of strict verification, which emits the target's tokens.

    Args:
        directory: the artefact.
        pair, task, rollout, calibration: of the run.
        tick: called with the number of answers that have arrived.

    Returns:
        The row of strict verification, and of each threshold, which it holds as ``threshold``.
    """
    problems = load_task(task.name, **task.options).problems(SEED, calibration.problems, "calibration")
    thresholds = sorted(set(calibration.thresholds))
    modes = [parse_mode("strict"), *(parse_mode(f"learned(threshold={threshold:g})") for threshold in thresholds)]
    strict, *rows = rows_of(evaluate(pair, task, rollout, modes, problems, directory, tick))
    curve = []
    for threshold, row in zip(thresholds, rows, strict=True):
        paired = row["paired_vs_target"]
        row["threshold"] = threshold
        curve.append(
            CurvePoint(
                threshold=threshold,
                accuracy=min(1.0, max(0.0, row["accuracy"])),
                accuracy_difference=paired["difference"],
                accuracy_difference_ci95=tuple(paired["ci95"]),
                acceptance_length=row["acceptance_length"],
                override_rate=row["override_rate"],
                num_problems=len(problems),
            )
        )
    best = max(curve, key=lambda point: point.accuracy + SPEED_WEIGHT * (1 - 1 / point.acceptance_length))
    arbiter, config = load_artefact(directory)
    config = config.model_copy(update={"threshold": best.threshold, "calibration": tuple(curve)})
    save_artefact(directory, arbiter, config, model_card(config))
    return [strict, *rows]
