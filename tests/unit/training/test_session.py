"""Starting Ray: again on a busy machine, and in one sentence when it will not start."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.rollout.session import START_ATTEMPTS, ray_session


class Ray:
    """Stands for ray.init: fails some times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[dict[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if len(self.calls) <= self.failures:
            raise Exception("The current node timed out\n  during startup.")


def replace(monkeypatch: pytest.MonkeyPatch, failures: int) -> Ray:
    stand_in = Ray(failures)
    monkeypatch.setattr(ray, "init", stand_in.init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return stand_in


def test_a_node_that_is_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(monkeypatch, START_ATTEMPTS - 1)
    with ray_session(None, cpus=2.5):
        assert [call["num_cpus"] for call in stand_in.calls] == [3] * START_ATTEMPTS


def test_what_keeps_ray_from_starting_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(monkeypatch, START_ATTEMPTS)
    with pytest.raises(
        ConfigError, match=r"^ray_address: Ray does not start .*\(The current node timed out during startup"
    ):
        ray_session(None, cpus=1).__enter__()
    assert len(stand_in.calls) == START_ATTEMPTS


def test_a_cluster_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"^ray_address: 'elsewhere:6379' cannot be used \("):
        ray_session("elsewhere:6379", cpus=1).__enter__()
    assert [call["address"] for call in stand_in.calls] == ["elsewhere:6379"]
