"""Imports a module of the benchmarks, which are no part of the wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def benchmark(name: str) -> ModuleType:
    """Return ``benchmarks.NAME``; the path is afterwards what it was."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path[:] = before
