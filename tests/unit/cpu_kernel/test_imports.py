"""What importing the kernels brings along."""

import subprocess
import sys

import pytest

SCRIPT = """
import importlib, sys
importlib.import_module(sys.argv[1])
above = ("vllm_cospec.training", "vllm_cospec.config", "vllm_cospec.arbiter", "vllm_cospec.runners", "ray")
heavy = ("torch", "numpy", "vllm") if sys.argv[2] == "light" else ("vllm",) if sys.argv[2] == "cpu" else ()
print([name for name in sys.modules if name in (*above, *heavy) or name.startswith("vllm_cospec.training")])
"""


@pytest.mark.parametrize(
    ("module", "weight"),
    [
        ("statistics", "light"),
        ("policies", "light"),
        ("reference", "cpu"),
        ("cpu", "cpu"),
        ("triton.step", "cpu"),
        ("triton.launch", "vllm"),
    ],
)
def test_kernels_bring_along_nothing_from_above_and_the_schema_no_torch(module: str, weight: str) -> None:
    command = [sys.executable, "-c", SCRIPT, f"vllm_cospec.kernels.{module}", weight]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if weight == "vllm" and "Triton is not installed" in done.stderr:
        pytest.skip("this machine has no Triton")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
