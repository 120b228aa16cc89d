"""Programs that need a process without a Ray of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def by_itself(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that has no Ray yet."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
