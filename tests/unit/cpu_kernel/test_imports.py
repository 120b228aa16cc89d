"""What importing the kernels brings along."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, json, sys
above = ("vllm_cospec.training", "vllm_cospec.config", "vllm_cospec.arbiter", "vllm_cospec.runners", "ray")
for module, *heavy in json.loads(sys.argv[1]):
    importlib.import_module(f"vllm_cospec.kernels.{module}")
    unwanted = [name for name in sys.modules if name in (*above, *heavy) or name.startswith("vllm_cospec.training")]
    print(module, unwanted, flush=True)
"""
# Each with what must not be there after it and those before it: from the lightest on, in one process.
MODULES = [
    ("statistics", "torch", "numpy", "vllm"),
    ("policies", "torch", "numpy", "vllm"),
    ("reference", "vllm"),
    ("cpu", "vllm"),
    ("triton.step", "vllm"),
    ("triton.launch",),
]


def test_kernels_bring_along_nothing_from_above_and_the_schema_no_torch() -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps(MODULES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.endswith("]")]
    if "Triton is not installed" in done.stderr:
        assert found == [f"{module} []" for module, *_ in MODULES[:-1]]
        pytest.skip("this machine has no Triton")
    assert found == [f"{module} []" for module, *_ in MODULES], done.stderr[-2000:]


def test_an_engine_can_start_in_a_process_that_has_compiled_the_loops() -> None:
    # vLLM's registry goes through the modules of the process when a worker starts
    script = (
        "import vllm_cospec.kernels.loops; from vllm.triton_utils import dispatcher; dispatcher._rebind_kernels([])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
