"""Steps aside for the package ``kernels`` of Hugging Face, where a checkout's folder of that name was found first."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def stand_aside(found: list[str]) -> None:
    """Put the package of that name that lies further down the path in the place of ours.

    Where there is none, ours keeps the name: it has no version, so transformers takes the package for absent. It
    would not survive an error here.

    Args:
        found: where the import system found ours.
    """
    ours = {Path(directory).resolve().parent for directory in found}
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() not in ours])
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module  # it imports its own submodules by that name
    spec.loader.exec_module(module)
