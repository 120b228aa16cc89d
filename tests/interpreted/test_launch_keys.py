"""Nothing compiles while requests wait: every program a step can launch is one that ``warm_up`` has compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SERVERS = {
    "aligned rows": (1536, 5, "bfloat16", True),
    "rows that are not": (50_257 // 32, 3, "bfloat16", True),
    "without draft logits": (2048, 1, "float32", False),
    "more logits than 2 GiB": (1000, 2, "bfloat16", True, True),
}
"""Vocabulary, K, dtype of the logits, whether the drafter has logits and, if so, whether a step has that many."""
RUNNERS = {"v2": False, "v1": True}


@pytest.fixture(scope="module")
def programs() -> dict[tuple[str, str], Any]:
    """How many programs the steps of each server reach, and those among them that were not compiled before."""
    jobs = {(server, runner): (RUNNERS[runner], *SERVERS[server]) for server in SERVERS for runner in RUNNERS}
    done = subprocess.run(
        [sys.executable, "-m", "launch_keys", json.dumps(list(jobs.values()))],
        env={**os.environ, "PYTHONPATH": str(HERE / "stand_in")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("server", SERVERS)
def test_warm_up_compiles_what_serving_launches(server: str, runner: str, programs: dict[tuple[str, str], Any]) -> None:
    reached, left_out = programs[server, runner]
    assert reached >= 10
    assert left_out == []
