"""A server that keeps to what was calibrated refuses requests that sample otherwise; others are told apart only."""

from dataclasses import replace
from typing import Any

import pytest
from artefacts import CONDITIONS
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_cospec.calibration import Conditions
from vllm_cospec.config import Calibrated, Settings
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.requests import check_sampling, request_settings, served_settings


def server(refuse: bool = True, conditions: Conditions | None = CONDITIONS) -> Settings:
    values: dict[str, Any] = {
        "policy": Learned(artefact="arbiter"), "threshold": 0.6, "max_overrides": None, "exact_tokens": 0,
        "collect": False, "draft_logits": True, "num_speculative_tokens": 5, "counters": "",
        "calibrated": Calibrated(conditions, refuse),
    }  # fmt: skip
    return Settings(**values)


def test_a_request_as_it_was_calibrated_is_arbitrated() -> None:
    assert request_settings(SamplingParams(temperature=0.0, top_p=0.5), server()).arbitrated


@pytest.mark.parametrize("sampling", [{"temperature": 0.8}, {}], ids=["a temperature", "vLLM's default"])
def test_another_temperature_is_refused_with_two_ways_out(sampling: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        request_settings(SamplingParams(**sampling), server())
    message = str(caught.value)
    assert message.isprintable()
    assert "temperature" in message
    assert "(0 was)" in message
    assert "cospec_policy='strict'" in message
    assert not served_settings(SamplingParams(**sampling), server()).arbitrated  # should it reach a runner all the same


def test_strict_requests_may_sample_as_they_like() -> None:
    for params in (
        SamplingParams(temperature=0.8, extra_args={"cospec_policy": "strict"}),
        SamplingParams(temperature=0.8, structured_outputs=StructuredOutputsParams(json={"type": "object"})),
    ):
        assert not request_settings(params, server()).arbitrated


def test_a_server_that_only_warns_arbitrates_them() -> None:
    params = SamplingParams(temperature=0.8)
    assert request_settings(params, server(refuse=False)).arbitrated
    assert "temperature 0.8" in str(check_sampling(params, server(refuse=False)))
    assert check_sampling(params, server(conditions=None)) is None
    assert check_sampling(SamplingParams(temperature=0.0), server()) is None


def test_what_the_operator_set_is_not_undone_by_a_requests_threshold() -> None:
    for threshold in (0.6, 0.9):
        params = SamplingParams(temperature=0.0, extra_args={"cospec_threshold": threshold})
        assert request_settings(params, server()).threshold == threshold
    lower = SamplingParams(temperature=0.0, extra_args={"cospec_threshold": 0.5})
    assert request_settings(lower, replace(server(), collect=True)).threshold == 0.5  # for training, any
    with pytest.raises(ConfigError, match=r"^vllm_xargs.cospec_threshold: 0\.5 is below this server's 0\.6; "):
        request_settings(lower, server())
