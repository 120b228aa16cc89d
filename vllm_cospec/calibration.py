"""What calibration knows of an arbiter, as its artefact carries it: the curve, its bounds, and what they hold for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from vllm_cospec.drift import Traffic
from vllm_cospec.errors import ArtefactError
from vllm_cospec.kernels.frozen import Frozen

STRICT_THRESHOLD = 1.0
"""No score exceeds it: every mismatch takes the target's token."""


class CurvePoint(Frozen):
    """What one threshold does on the calibration problems."""

    threshold: float = Field(ge=0, le=1)
    accuracy: float = Field(ge=0, le=1)
    accuracy_difference: float = Field(ge=-1, le=1)
    """Accuracy minus strict's, which is the target's own."""
    accuracy_difference_ci95: tuple[float, float]
    """95 % confidence interval of the difference of this point alone."""
    loss_bound: float | None = Field(None, ge=0, le=1)
    """The loss is below this at the calibration's level, in the sequence of tests from the strictest threshold on; so
    it is never smaller than that of a stricter one. None: calibrated by a version that tested no bounds."""
    acceptance_length: float = Field(ge=1)
    override_rate: float = Field(ge=0, le=1)
    """Overrides / mismatches."""
    num_problems: int = Field(ge=1)


class Conditions(Frozen):
    """What the bounds hold for. An empty string stands for what does not apply, or is not known."""

    draft: str
    """Hash of the draft's weights, see `vllm_cospec.fingerprint.weights_hash`."""
    num_speculative_tokens: int = Field(ge=1)
    dtype: str
    """Of the target, for example bfloat16."""
    chat_template: str
    """Hash of the tokenizer's."""
    temperature: tuple[float, float]
    """Lowest and highest; 0 is greedy."""
    top_p: tuple[float, float]
    """Lowest and highest."""


class Statement(Frozen):
    """How the bounds of a curve were found."""

    level: float = Field(gt=0.5, lt=1)
    """Of confidence, for one margin that was chosen without looking at the curve."""
    test: Literal["exact", "betting"]
    """Of right and wrong answers, or of partial credit; see vllm_cospec.training.measure.noninferiority."""
    max_accuracy_loss: float = Field(ge=0, le=1)
    """The margin that the artefact's own threshold keeps."""
    speed_weight: float = Field(ge=0, lt=1)
    """What a share of target steps saved counted for when that threshold was chosen."""
    task: str
    task_hash: str
    """Of the problems: prompts and answers."""
    conditions: Conditions
    traffic: Traffic | None = None
    """What was seen of the requests at the artefact's own threshold; None where that is strict."""


def calibrated_threshold(curve: Sequence[CurvePoint], where: str, max_accuracy_loss: float) -> float:
    """Return the threshold with the longest acceptance length that passes at a margin; strict where none does.

    Args:
        curve: of an artefact.
        where: its path, for the message.
        max_accuracy_loss: the margin.

    Raises:
        ArtefactError: there is no curve, or it has no bounds.
    """
    if not curve:
        raise ArtefactError(
            f"max_accuracy_loss: {where} has no calibration curve; run `cospec calibrate` or pass threshold"
        )
    if any(point.loss_bound is None for point in curve):
        raise ArtefactError(
            f"max_accuracy_loss: {where} was calibrated by a version that tested no bounds; run `cospec calibrate` "
            f"again or pass threshold"
        )
    passed = [point for point in curve if point.loss_bound is not None and point.loss_bound <= max_accuracy_loss]
    best = max(passed, key=lambda point: (point.acceptance_length, point.threshold), default=None)
    return STRICT_THRESHOLD if best is None else best.threshold


def differences(calibrated: Conditions, served: Conditions) -> list[str]:
    """Return, as clauses of a sentence, what is served otherwise than it was calibrated; sampling is not looked at."""
    found = []
    if calibrated.draft != served.draft:
        found.append(
            "another draft" if served.draft else "a draft whose weights are not on this machine to be compared"
        )
    if calibrated.num_speculative_tokens != served.num_speculative_tokens:
        k = calibrated.num_speculative_tokens
        found.append(f"num_speculative_tokens {served.num_speculative_tokens} instead of {k}")
    if calibrated.dtype != served.dtype:
        found.append(f"dtype {served.dtype} instead of {calibrated.dtype}")
    if calibrated.chat_template != served.chat_template:
        found.append("another chat template")
    return found


def sampled_otherwise(calibrated: Conditions, temperature: float, top_p: float) -> str | None:
    """Return, as a clause, what a request samples otherwise than was calibrated; None where it does not."""
    low, high = calibrated.temperature
    if not low <= temperature <= high:
        return f"temperature {temperature:g} was not calibrated ({_span(low, high)} was)"
    low, high = calibrated.top_p
    if temperature > 0 and not low <= top_p <= high:
        return f"top_p {top_p:g} was not calibrated ({_span(low, high)} was)"
    return None


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
