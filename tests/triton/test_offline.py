"""The kernels compile for GPUs that are not here, and no variant of the default path spills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernel.py"


@pytest.mark.timeout(900)
def test_the_learned_policy_compiles_for_every_target_without_spilling(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--no-cpu", "--only", ": bf16, draft logits", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(report.read_text())["offline"]
    ours = [row for row in rows if not row["kernel"].startswith("_")]
    assert {row["target"] for row in ours} == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
    assert {row["kernel"] for row in ours} == {"target_statistics_kernel", "row_kernel", "scan_kernel"}
    assert [row for row in ours if row["spill_bytes"]] == []
