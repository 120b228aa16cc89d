"""The kernels under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
_START = 60  # seconds until a kit under a tool begins to compare
_FOUND = 86  # exit code that stands for an error the tool has found


def measure(seconds: float) -> dict[str, Any]:
    """Compare the kernels with the reference under each tool; returns by tool what came of it."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"skipped": "compute-sanitizer is not installed"}
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(lambda tool: check(sanitizer, tool, seconds), TOOLS), strict=True))


def check(sanitizer: str, tool: str, seconds: float) -> str:
    """Return "clean", or what was found, in the tool's words."""
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), "--target-processes", "application-only",
        sys.executable, "-m", "benchmarks.gpu", "--parts", "kernels", "--repetitions", "1",
        "--workers", "1", "--minutes", str(seconds / 60),
    ]  # fmt: skip
    # an allocation of its own for every tensor: in the pools of torch's allocator one may read beyond its own end
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, timeout=seconds + _START, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done within {seconds + _START:.0f} s"
    if done.returncode == 0:
        return "clean"
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    return f"exit code {done.returncode}: {' '.join(lines[:12]) or done.stdout[-600:]}"


def problems(findings: dict[str, Any]) -> list[str]:
    """Return what must not be so, in sentences."""
    return [f"{tool}: {text}" for tool, text in findings.items() if tool != "skipped" and text != "clean"]
