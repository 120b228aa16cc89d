"""A vLLM that lacks what cospec stands on is refused with a sentence, and serves on without cospec."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from changed_vllm import HOOK, examined, run
from engines import IMPORTED, forked

HERE = Path(__file__).parent
SUPPORT = HERE.parent / "support"


def changed_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE / "broken_vllm", SUPPORT)))}


def job(pair: Path, prompts: list[str], method: str, **keys: Any) -> dict[str, Any]:
    speculative_config = {"method": method, "model": str(pair / "draft"), "num_speculative_tokens": 5, **keys}
    return {
        "engine": {"model": str(pair / "target"), "speculative_config": speculative_config},
        "runs": [{"name": "run", "prompts": prompts[:4], "params": {"temperature": 0, "max_tokens": 30}}],
    }


def test_doctor_names_the_changed_hook() -> None:
    report = forked(examined, None, IMPORTED)
    assert report["ok"] is False
    assert [h["target"].endswith(HOOK) for h in report["hooks"] if h["status"] != "found"] == [True]
    assert report["vllm"] in report["problems"][0]
    assert HOOK in report["problems"][0]


@pytest.mark.engine
def test_cospec_is_refused_at_start_up(pair: Path, prompts: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, str(SUPPORT / "engines.py")],
        input=json.dumps(job(pair, prompts, "cospec", arbiter={"policy": "typical"})),
        capture_output=True, text=True, timeout=300, env=changed_environment(), check=False,
    )  # fmt: skip
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode != 0
    assert HOOK in last
    assert "vLLM 0.3" in last
    assert "install vllm" in last


@pytest.mark.engine
def test_vllm_without_cospec_still_serves(pair: Path, prompts: list[str]) -> None:
    with pytest.raises(AssertionError, match=HOOK):  # it is the changed one
        forked(run, job(pair, prompts, "cospec", arbiter={"policy": "typical"}), IMPORTED)
    result = forked(run, job(pair, prompts, "draft_model"), IMPORTED)
    assert all(outputs[0]["text"] for outputs in result["runs"]["run"])
