"""What a step asks of the host: kernels are launched, two tensors are allocated, and nothing else happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "host.py"
DRAWING = ["_resample_kernel", "_insert_resampled_kernel"]  # vLLM's own


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every kind of step asks for, by its name."""
    report = tmp_path_factory.mktemp("host") / "report.json"
    command = [sys.executable, str(BENCHMARK), "--batch", "3", "--repetitions", "20", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["step"]: row for row in json.loads(report.read_text())["host"]}


@pytest.mark.parametrize(
    ("step", "launches"),
    [
        ("a rule", ["target_statistics_kernel", "verdict_kernel", "scan_kernel"]),
        ("learned", ["target_statistics_kernel", "verdict_kernel", "mismatch_kernel", "scan_kernel"]),
    ],
)
def test_a_step_launches_its_kernels_and_nothing_of_torch_s(
    step: str, launches: list[str], work: dict[str, Any]
) -> None:
    assert work[step]["launches"] == launches + DRAWING
    assert work[step]["allocations"] == 2  # the tokens, and how many
    assert work[step]["others"] == []
    assert work[step]["host_us"] > 0


def test_stock_allocates_its_scratch_at_every_step(work: dict[str, Any]) -> None:
    assert len(work["stock"]["launches"]) == 4
    assert work["stock"]["allocations"] > work["learned"]["allocations"]
