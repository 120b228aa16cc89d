"""Calibration: what each threshold does on held-out problems, and which one is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_cospec.arbiter import CurvePoint, load_artefact, save_artefact
from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.measure.card import model_card
from vllm_cospec.training.measure.evaluate import evaluate, rows_of
from vllm_cospec.training.measure.modes import parse_mode
from vllm_cospec.training.tasks import Problem

SPEED_WEIGHT = 0.02


def calibrate(
    directory: Path,
    config: TrainConfig,
    problems: Sequence[Problem],
    tick: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Measure the thresholds, choose one, and write curve and choice into the artefact. Needs a Ray session.

    The chosen threshold is the one with the most accuracy, where a gain in speed counts as little as in training. The
    target's own accuracy is that of strict verification, which emits the target's tokens.

    Args:
        directory: the artefact.
        config: of the run.
        problems: of the calibration split.
        tick: called with the number of answers that have arrived.

    Returns:
        The row of strict verification, and of each threshold, which it holds as ``threshold``.
    """
    thresholds = sorted(set(config.calibration.thresholds))
    modes = [parse_mode("strict"), *(parse_mode(f"learned(threshold={threshold:g})") for threshold in thresholds)]
    strict, *rows = rows_of(evaluate(config.pair, config.task, config.rollout, modes, problems, directory, tick))
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
    arbiter, made = load_artefact(directory)
    made = made.model_copy(update={"threshold": best.threshold, "calibration": tuple(curve)})
    save_artefact(directory, arbiter, made, model_card(made))
    return [strict, *rows]
