"""Markers by folder, and one thread for each engine."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Several processes run engines of tiny models beside each other: one thread each, on whichever core is free. vLLM would
# bind them all to the same one, and numba, which it drafts n-grams with, give OpenMP a thread for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts engines and what interprets."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        if folder in ("engine", "interpreted"):
            item.add_marker(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is no text in a test's output: a report with a lone surrogate could not leave its process."""
    report = yield
    report.sections = [
        (name, content.encode("utf-8", "backslashreplace").decode()) for name, content in report.sections
    ]
    return report
