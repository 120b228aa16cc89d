"""Branches, which training asks an engine that collects for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams

from vllm_cospec.config import Settings
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.requests import Branch, request_settings

BRANCH: dict[str, Any] = {"written": 4, "overrides": 1, "decided_at": 6, "keep": True}


def asked(branch: dict[str, Any], collect: bool = True) -> Branch | None:
    server = Settings(
        policy=Learned(artefact="arbiter"), threshold=0.6, max_overrides=7, exact_tokens=2, collect=collect,
        draft_logits=True, num_speculative_tokens=5, counters="",
    )  # fmt: skip
    return request_settings(SamplingParams(extra_args={"cospec_branch": branch}), server).branch


def test_a_branch_is_taken_where_decisions_are_collected_and_refused_elsewhere() -> None:
    assert asked(BRANCH) == Branch(written=4, overrides=1, decided_at=6, keep=True)
    with pytest.raises(ConfigError, match="cospec_branch: is for training"):
        asked(BRANCH, collect=False)
    for bad in ({"written": -1}, {"keep": 1}, {"decided_at": 2**31}, {"more": 1}, {"first_token": -1}):
        with pytest.raises(ConfigError, match=r"vllm_xargs\.cospec_branch\."):
            asked({**BRANCH, **bad})


def test_the_state_of_its_generator_is_one_or_is_refused() -> None:
    state = torch.Generator().manual_seed(5).get_state().numpy().tobytes()
    found = asked({**BRANCH, "first_token": 7, "generator": state, "reseed": 9})
    assert found is not None
    assert (found.generator, found.first_token, found.reseed) == (state, 7, 9)
    for damaged in (b"", state[:-1], b"\xff" * len(state)):
        with pytest.raises(ConfigError, match=r"branch\.generator: is no state of a generator on the CPU") as error:
            asked({**BRANCH, "generator": damaged})
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 600
