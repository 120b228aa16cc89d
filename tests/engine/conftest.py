"""Real engines, each in a process of its own, and the bundled pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import run_by_itself, run_forked

import vllm_cospec.demo
from vllm_cospec.training.rollout.session import ray_session
from vllm_cospec.training.tasks import load_task

RunEngine = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray session."""
    with ray_session(None, cpus=8):
        yield


@pytest.fixture(scope="session")
def pair() -> Path:
    """The directory that holds target/ and draft/."""
    return Path(vllm_cospec.demo.__file__).parent


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """200 held-out problems."""
    return [problem.prompt for problem in load_task("demo").problems(seed=11, n=200)]


@pytest.fixture(scope="session")
def run_engine(pair: Path) -> RunEngine:
    """Run a job on an engine with the bundled target; see ``engines.run`` for its form."""

    def run(
        runs: list[dict[str, Any]], speculative_config: Any = None, mend: bool = False, **engine: Any
    ) -> dict[str, Any]:
        engine = {"model": str(pair / "target"), "speculative_config": speculative_config} | engine
        job = {"engine": engine, "runs": runs, "mend": mend}
        return run_by_itself(job) if engine.get("tensor_parallel_size", 1) > 1 else run_forked(job)

    return run
