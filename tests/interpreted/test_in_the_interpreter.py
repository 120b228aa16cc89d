"""Every file inside, in a process of its own that interprets Triton.

They can also be run by hand, see docs/kernels.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "inside").glob("test_*.py"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str, request: pytest.FixtureRequest) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")])),
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "--override-ini=timeout=2400", "-m", request.config.option.markexpr,
        "--durations=10", str(HERE / "inside" / file),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode in (0, 5), done.stdout[-8000:]  # 5: nothing of it was asked for
