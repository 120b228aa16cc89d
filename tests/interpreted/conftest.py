"""Leaves the interpreted tests to a process that interprets Triton, and starts that process early.

They take minutes on one core, the engine tests that come first leave one free.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import pytest

HERE = Path(__file__).parent
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["inside", "stand_in"]
_running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or not any(item.name == "test_interpreted" for item in session.items):
        return
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")])),
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "--override-ini=timeout=2400", "-m", session.config.option.markexpr,
        "--durations=20", str(HERE / "inside"),
    ]  # fmt: skip
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the session ends
    _running.append((subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log))


def pytest_sessionfinish(session: pytest.Session) -> None:
    for process, log in _running:
        process.kill()
        process.wait()
        log.close()
    _running.clear()


@pytest.fixture
def interpreted() -> Any:
    """The process that runs the interpreted tests, and the file it writes to."""
    return _running[0]
