"""What an alarm leads to: a line in the log, or strict verification for as long as was asked for."""

from __future__ import annotations

from typing import Any

import pytest
from drift_traffic import some

import vllm_cospec.watch as watch_module
from vllm_cospec.config import Settings
from vllm_cospec.drift import Traffic
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.training.measure.traffic import traffic_of
from vllm_cospec.watch import Watch


@pytest.fixture(scope="module")
def expected() -> Traffic:
    return traffic_of(some(1000, seed=1))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(watch_module.logger, "warning", lambda text, *args: said.append(text % args))
    return said


def watch(expected: Traffic, **changes: Any) -> Watch:
    return Watch(
        Settings(
            policy=Learned(artefact="arbiter"), threshold=0.5, max_overrides=None, exact_tokens=0, collect=False,
            draft_logits=True, num_speculative_tokens=5, counters="", traffic=expected, **changes,
        )
    )  # fmt: skip


def send(found: Watch, n: int, **how: float) -> int:
    """Send requests until verification is strict, n at most; returns how many."""
    for i, request in enumerate(some(n, seed=5, **how), 1):
        found.finished(request)
        if found.strict:
            return i
    return n


def test_calibrated_traffic_changes_nothing(expected: Traffic, warnings: list[str]) -> None:
    found = watch(expected, on_drift="strict")
    assert send(found, 2000) == 2000
    assert not warnings


def test_an_alarm_is_logged_once_and_requests_go_on(expected: Traffic, warnings: list[str]) -> None:
    found = watch(expected)
    assert send(found, 300, mismatch_rate=0.3) == 300
    (said,) = warnings
    assert "mismatches per token above what calibration saw" in said
    assert "go on being arbitrated" in said


def test_strict_stays_until_the_server_is_started_again(expected: Traffic, warnings: list[str]) -> None:
    found = watch(expected, on_drift="strict")
    assert send(found, 100, mismatch_rate=0.3) < 100
    for _ in range(5000):
        found.finished(None)
    assert found.strict
    (said,) = warnings
    assert "verified strictly until the server is started again" in said


def test_arbitration_comes_back_after_the_pause_and_other_traffic_is_noticed_again(
    expected: Traffic, warnings: list[str]
) -> None:
    found = watch(expected, on_drift="strict", drift_pause=50)
    assert send(found, 100, mismatch_rate=0.3) < 100
    for i in range(50):
        assert found.strict, i
        found.finished(None)
    assert not found.strict
    assert send(found, 1000) == 1000
    assert send(found, 100, mismatch_rate=0.3) < 100
    assert ["until 50 of them" in said or "arbitrated again" in said for said in warnings] == [True] * 3


def test_a_request_with_settings_of_its_own_says_nothing(expected: Traffic, warnings: list[str]) -> None:
    found = watch(expected, on_drift="strict")
    for _ in range(1000):
        found.finished(None)
    assert not found.strict
    assert not warnings
