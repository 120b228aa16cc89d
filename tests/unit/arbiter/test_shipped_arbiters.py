"""The arbiters that ship: what their calibration says, and that it was measured as their configurations say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cospec.arbiter import load_artefact
from vllm_cospec.calibration import STRICT_THRESHOLD, calibrated_threshold
from vllm_cospec.fingerprint import weights_hash
from vllm_cospec.training.config import bundled, cached_pair, load_train_config
from vllm_cospec.training.measure.fixed_sequence import threshold_sequence
from vllm_cospec.training.preflight import CALIBRATION_SEED
from vllm_cospec.training.tasks import digest, load_task

ROOT = Path(__file__).parents[3]
ARBITERS = {
    "demo": bundled("target").parent / "arbiter",
    "smollm2": ROOT / "benchmarks" / "smollm2" / "arbiter",
    "code": ROOT / "benchmarks" / "code" / "arbiter",
}


@pytest.mark.parametrize("name", ARBITERS)
def test_a_shipped_arbiter_was_calibrated_as_its_configuration_says(name: str) -> None:
    config = load_train_config(ROOT / "training" / "configs" / f"{name}.toml")
    _, artefact = load_artefact(ARBITERS[name])
    statement, calibration = artefact.statement, config.calibration
    assert statement is not None
    assert artefact.format_version == 2
    assert (statement.level, statement.max_accuracy_loss, statement.test) == (0.95, 0.01, "exact")
    assert statement.speed_weight == config.learner.speed_weight
    assert tuple(point.threshold for point in artefact.calibration) == threshold_sequence(calibration.thresholds)
    assert {point.num_problems for point in artefact.calibration} == {calibration.problems}
    conditions = statement.conditions
    assert conditions.num_speculative_tokens == config.pair.num_speculative_tokens
    assert conditions.dtype == config.pair.engine["dtype"]
    assert (conditions.temperature, conditions.top_p) == ((0, 0), (1, 1))
    assert conditions.draft
    if name == "demo":
        assert conditions.draft == weights_hash(str(bundled("draft")))


@pytest.mark.parametrize("name", ARBITERS)
def test_a_shipped_arbiter_names_the_problems_it_was_calibrated_on(name: str) -> None:
    if name == "code" and not cached_pair("code").is_dir():
        pytest.skip("its lines are cut with the target's tokenizer: make code-pair")
    config = load_train_config(ROOT / "training" / "configs" / f"{name}.toml")
    statement = load_artefact(ARBITERS[name])[1].statement
    assert statement is not None
    problems = load_task(config.task.name, **config.task.options).problems(
        CALIBRATION_SEED, config.calibration.problems, "calibration"
    )
    assert (statement.task, statement.task_hash) == (config.task.name, digest(problems))


@pytest.mark.parametrize("name", ARBITERS)
def test_the_threshold_that_ships_keeps_the_loss(name: str) -> None:
    _, artefact = load_artefact(ARBITERS[name])
    assert artefact.statement is not None
    curve = {point.threshold: point for point in artefact.calibration}
    own = curve[artefact.threshold]
    assert own.loss_bound is not None
    assert own.loss_bound <= artefact.statement.max_accuracy_loss
    assert artefact.threshold < STRICT_THRESHOLD
    assert own.accuracy > curve[STRICT_THRESHOLD].accuracy
    loosest = calibrated_threshold(artefact.calibration, name, artefact.statement.max_accuracy_loss)
    assert curve[loosest].acceptance_length >= own.acceptance_length


@pytest.mark.parametrize("name", ARBITERS)
def test_requests_at_the_threshold_that_ships_are_known(name: str) -> None:
    _, artefact = load_artefact(ARBITERS[name])
    own = next(point for point in artefact.calibration if point.threshold == artefact.threshold)
    assert artefact.statement is not None
    traffic = artefact.statement.traffic
    assert traffic is not None
    assert traffic.requests == own.num_problems
    assert 0 < traffic.overrides_per_mismatch.mean < 1
