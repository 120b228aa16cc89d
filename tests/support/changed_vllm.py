"""A vLLM in which one function that cospec stands on has another signature; vLLM itself does not mind."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import engines

MODULE = "vllm.v1.spec_decode.llm_base_proposer"
HOOK = "SpecDecodeBaseProposer._sample_draft_tokens"


def change(module: ModuleType) -> None:
    """Rename the parameters of a method in the module named ``MODULE``."""
    original = module.SpecDecodeBaseProposer._sample_draft_tokens

    def renamed(self: Any, states: Any, metadata: Any) -> Any:
        return original(self, states, metadata)

    module.SpecDecodeBaseProposer._sample_draft_tokens = renamed


def examined(_: None = None) -> dict[str, Any]:
    """What ``cospec doctor`` finds on the changed vLLM."""
    from vllm.v1.spec_decode import llm_base_proposer

    from vllm_cospec.doctor import examine

    change(llm_base_proposer)
    return examine()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job of :mod:`engines` on the changed vLLM."""
    from vllm.v1.spec_decode import llm_base_proposer

    change(llm_base_proposer)
    return engines.run(job)
