"""Put this folder and tests/support on PYTHONPATH: every process then gets the vLLM of ``changed_vllm``."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

from changed_vllm import MODULE, change


class ChangedLoader(importlib.abc.Loader):
    """Loads the real module, then changes it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        change(module)


class ChangedFinder(importlib.abc.MetaPathFinder):
    """Puts the loader in front of the one module."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = ChangedLoader(spec.loader)
        return spec


sys.meta_path.insert(0, ChangedFinder())
