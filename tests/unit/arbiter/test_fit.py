"""Nothing made for something else gets in, and the threshold comes from the curve."""

from typing import Any

import pytest
from artefacts import VOCABULARY, make_config, point, refusal

from vllm_cospec.arbiter import calibrated_threshold, check_fit, tokenizer_hash


def test_an_artefact_fits_what_it_was_trained_for() -> None:
    check_fit(make_config(), "here", True, tokenizer_hash(VOCABULARY))
    check_fit(make_config(draft_logits=False), "here", False, tokenizer_hash(VOCABULARY))


@pytest.mark.parametrize(
    ("trained_with", "draft_logits", "vocabulary", "named"),
    [
        (True, False, VOCABULARY, ["with draft logits", "none"]),
        (False, True, VOCABULARY, ["without draft logits", "them"]),
        (True, True, {"a": 0, "b": 2, "<eos>": 1}, ["tokenizer", tokenizer_hash(VOCABULARY)]),
    ],
)
def test_an_artefact_made_for_something_else_is_refused(
    trained_with: Any, draft_logits: Any, vocabulary: Any, named: Any
) -> None:
    config = make_config(draft_logits=trained_with)
    message = refusal(
        lambda: check_fit(config, "path/of/it", draft_logits, tokenizer_hash(vocabulary)),
    )
    assert all(part in message for part in ["path/of/it", *named]), message


def test_tokenizer_hash_is_of_the_vocabulary_and_not_of_its_order() -> None:
    assert tokenizer_hash(VOCABULARY) == tokenizer_hash(dict(reversed(VOCABULARY.items())))
    others = [{**VOCABULARY, "c": 3}, {"a": 1, "b": 0, "<eos>": 2}, {"A": 0, "b": 1, "<eos>": 2}, {}]
    assert len({tokenizer_hash(vocabulary) for vocabulary in [VOCABULARY, *others]}) == 5
    assert len(tokenizer_hash({"\udce9 é 日本": 0})) == 16  # byte-level vocabularies hold anything


# Threshold from the curve

CURVE = (
    point(0.1, -0.30, 4.5),
    point(0.3, -0.04, 3.5),
    point(0.5, -0.04, 3.5),
    point(0.7, -0.02, 3.0),
    point(0.8, -0.03, 3.2),
    point(0.95, +0.01, 1.5),
)


@pytest.mark.parametrize(
    ("loss", "threshold"),
    [
        (0.5, 0.1),
        (0.1, 0.5),  # of the two points of equal length the more cautious
        (0.035, 0.8),
        (0.025, 0.7),
        (0.01, 0.95),
    ],
)
def test_the_longest_acceptance_within_the_bound_is_chosen(loss: float, threshold: float) -> None:
    for curve in (CURVE, CURVE[::-1]):
        assert calibrated_threshold(make_config(calibration=curve), "here", loss) == threshold


def test_a_point_counts_by_the_end_of_its_interval_and_not_by_its_middle() -> None:
    curve = (point(0.2, -0.2, 4.0, accuracy_difference=0.05), point(0.9, -0.05, 2.0))
    assert calibrated_threshold(make_config(calibration=curve), "here", 0.1) == 0.9


def test_a_loss_must_stay_below_the_bound() -> None:
    config = make_config(calibration=(point(0.5, -0.25, 2.0),))  # -0.25 is exact in binary
    assert calibrated_threshold(config, "here", 0.2500001) == 0.5
    assert "max_accuracy_loss" in refusal(lambda: calibrated_threshold(config, "here", 0.25))


def test_a_bound_no_point_meets_is_refused_with_the_best_there_is() -> None:
    message = refusal(lambda: calibrated_threshold(make_config(calibration=CURVE[:5]), "path/of/it", 0.01))
    assert all(part in message for part in ("max_accuracy_loss", "path/of/it", "0.01", "0.02")), message


def test_an_artefact_without_a_curve_cannot_bound_the_loss() -> None:
    message = refusal(lambda: calibrated_threshold(make_config(calibration=()), "path/of/it", 0.1))
    assert all(part in message for part in ("max_accuracy_loss", "path/of/it", "calibrate")), message
