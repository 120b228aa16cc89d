"""Steps aside for the package ``kernels`` of Hugging Face, where a checkout's folder of that name was found first."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


def stand_aside(found: list[str]) -> ModuleType:
    """Return the package of that name that lies further down the path.

    Args:
        found: where the import system found ours.

    Raises:
        ModuleNotFoundError: there is none.
    """
    ours = {Path(directory).resolve().parent for directory in found}
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() not in ours])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'kernels'", name="kernels")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module  # it imports its own submodules by that name
    spec.loader.exec_module(module)
    return module
