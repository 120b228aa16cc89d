"""The tests that need interpreted Triton run in a process of their own: the switch cannot be thrown later.

They can also be run by hand, see docs/kernels.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(3600)
def test_interpreted(request: pytest.FixtureRequest) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")])),
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "--override-ini=timeout=2400", "-m", request.config.option.markexpr,
        "--durations=20", str(HERE / "inside"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout[-8000:].decode(errors="replace")
