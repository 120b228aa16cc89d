"""A vLLM that lacks what cospec stands on is refused with a sentence, and serves on without cospec."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
HOOK = "SpecDecodeBaseProposer._sample_draft_tokens"


def changed_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE / "broken_vllm")}


def run_job(pair: Path, prompts: list[str], speculative_config: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    job = {
        "engine": {"model": str(pair / "target"), "speculative_config": speculative_config},
        "runs": [{"name": "run", "prompts": prompts[:4], "params": {"temperature": 0, "max_tokens": 30}}],
    }
    return subprocess.run(
        [sys.executable, str(HERE.parent / "support" / "engines.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=300,
        env=changed_environment(),
        check=False,
    )


def test_doctor_names_the_changed_hook() -> None:
    command = [str(Path(sys.executable).with_name("cospec")), "doctor", "--json"]
    healthy = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert healthy.returncode == 0, healthy.stdout
    assert json.loads(healthy.stdout)["ok"] is True
    changed = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=changed_environment(), check=False
    )
    report = json.loads(changed.stdout)
    assert changed.returncode == 1
    assert report["ok"] is False
    assert [h["target"].endswith(HOOK) for h in report["hooks"] if h["status"] != "found"] == [True]
    assert report["vllm"] in report["problems"][0]
    assert HOOK in report["problems"][0]


@pytest.mark.engine
def test_cospec_is_refused_at_start_up(pair: Path, prompts: list[str]) -> None:
    process = run_job(
        pair, prompts, {"method": "cospec", "model": str(pair / "draft"), "num_speculative_tokens": 5,
                        "arbiter": {"policy": "typical"}},
    )  # fmt: skip
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode != 0
    assert HOOK in last
    assert "vLLM 0.3" in last
    assert "install vllm" in last


@pytest.mark.engine
def test_vllm_without_cospec_still_serves(pair: Path, prompts: list[str]) -> None:
    process = run_job(
        pair, prompts, {"method": "draft_model", "model": str(pair / "draft"), "num_speculative_tokens": 5}
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert all(outputs[0]["text"] for outputs in json.loads(process.stdout)["runs"]["run"])
