"""A vLLM in which one function that cospec stands on has another signature. vLLM itself does not mind.

Put this folder on PYTHONPATH: every process of the engine then gets the changed vLLM.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

CHANGED = "vllm.v1.spec_decode.llm_base_proposer"


class ChangedLoader(importlib.abc.Loader):
    """Loads the real module, then renames the parameters of one method."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        original = module.SpecDecodeBaseProposer._sample_draft_tokens

        def renamed(self, states, metadata):  # type: ignore[no-untyped-def]
            return original(self, states, metadata)

        module.SpecDecodeBaseProposer._sample_draft_tokens = renamed


class ChangedFinder(importlib.abc.MetaPathFinder):
    """Puts the loader in front of the one module."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != CHANGED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = ChangedLoader(spec.loader)
        return spec


sys.meta_path.insert(0, ChangedFinder())
