"""The threshold comes from the curve's bounds, and the bounds hold for what was calibrated."""

from typing import Any

import pytest
from artefacts import CONDITIONS, point, refusal

from vllm_cospec.calibration import STRICT_THRESHOLD, calibrated_threshold, differences, sampled_otherwise

CURVE = (
    point(1.0, 0.0, 1.4),
    point(0.95, 0.005, 1.5),
    point(0.8, 0.02, 3.2),
    point(0.7, 0.03, 3.0),
    point(0.5, 0.04, 3.5),
    point(0.3, 0.04, 3.5),
    point(0.1, 0.30, 4.5),
)


@pytest.mark.parametrize(
    ("loss", "threshold"),
    [
        (0.5, 0.1),
        (0.3, 0.1),  # the bound itself passes
        (0.2999, 0.5),  # of the two points of equal length the more cautious
        (0.035, 0.8),  # a looser threshold passes too, but is not faster
        (0.019, 0.95),
        (0.001, STRICT_THRESHOLD),
    ],
)
def test_the_longest_acceptance_within_the_bound_is_chosen(loss: float, threshold: float) -> None:
    for curve in (CURVE, CURVE[::-1]):
        assert calibrated_threshold(curve, "here", loss) == threshold


def test_where_no_threshold_passes_the_answer_is_strict() -> None:
    assert calibrated_threshold(CURVE[1:], "here", 0.001) == STRICT_THRESHOLD


def test_an_artefact_without_a_curve_cannot_bound_the_loss() -> None:
    message = refusal(lambda: calibrated_threshold((), "path/of/it", 0.1))
    assert all(part in message for part in ("max_accuracy_loss", "path/of/it", "calibrate")), message


def test_a_curve_without_bounds_cannot_either() -> None:
    message = refusal(lambda: calibrated_threshold((point(0.5, None, 3.0),), "path/of/it", 0.1))
    assert all(part in message for part in ("max_accuracy_loss", "path/of/it", "again", "calibrate")), message


def test_the_same_conditions_do_not_differ_whatever_a_request_samples() -> None:
    assert differences(CONDITIONS, CONDITIONS) == []
    assert differences(CONDITIONS, CONDITIONS.model_copy(update={"temperature": (1.0, 1.0)})) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"draft": "other"}, "another draft"),
        ({"draft": ""}, "not on this machine"),
        ({"num_speculative_tokens": 4}, "num_speculative_tokens 4 instead of 7"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 instead of float32"),
        ({"chat_template": ""}, "another chat template"),
    ],
)
def test_each_difference_is_named(change: dict[str, Any], named: str) -> None:
    (found,) = differences(CONDITIONS, CONDITIONS.model_copy(update=change))
    assert named in found


@pytest.mark.parametrize(
    ("temperature", "top_p", "named"),
    [
        (0.0, 1.0, None),
        (0.5, 0.9, None),
        (0.5, 1.0, None),
        (0.7, 1.0, "temperature 0.7 was not calibrated (0 to 0.5 was)"),
        (0.5, 0.5, "top_p 0.5 was not calibrated (0.9 to 1 was)"),
        (0.0, 0.5, None),  # greedy decoding does not look at top_p
    ],
)
def test_sampling_outside_of_what_was_calibrated_is_named(temperature: float, top_p: float, named: str | None) -> None:
    conditions = CONDITIONS.model_copy(update={"temperature": (0.0, 0.5), "top_p": (0.9, 1.0)})
    assert sampled_otherwise(conditions, temperature, top_p) == named
