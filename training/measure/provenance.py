"""Where a result comes from - machine, versions, date, command - and how it reaches its file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vllm_cospec.atomic import write_text
from vllm_cospec.compat import vllm_version


def environment() -> dict[str, Any]:
    """Describe machine and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "vllm": vllm_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def command_line() -> str:
    """Return the command this process was started with, as one would type it."""
    return " ".join([Path(sys.argv[0]).name, *map(shlex.quote, sys.argv[1:])])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON behind where it comes from; a reader sees the old file or the new one, never a part."""
    origin = {"environment": environment(), "command": command_line()}
    write_text(path, json.dumps(origin | result, indent=1) + "\n")


def _cpu_model() -> str | None:
    """Return what Linux calls the processor; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
