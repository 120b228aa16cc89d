"""Nothing compiles while requests wait: every program a step can launch is one that ``warm_up`` has compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("vocab", "k", "dtype", "has_draft"),
    [(1536, 5, "bfloat16", True), (50_257 // 32, 3, "bfloat16", True), (2048, 1, "float32", False)],
    ids=["aligned rows", "rows that are not", "without draft logits"],
)
def test_warm_up_compiles_what_serving_launches(vocab: int, k: int, dtype: str, has_draft: bool, v1: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch_keys", json.dumps([vocab, k, dtype, has_draft, v1])],
        env={**os.environ, "PYTHONPATH": str(HERE / "stand_in")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    reached, left_out = json.loads(done.stdout.splitlines()[-1])
    assert reached >= 10
    assert left_out == []
