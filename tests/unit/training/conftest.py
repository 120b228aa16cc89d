"""A Ray session for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_cospec.training.rollout.session import ray_session


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with ray_session(None, cpus=8):
        yield
