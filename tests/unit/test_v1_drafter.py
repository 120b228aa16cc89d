"""What V1's drafter is fed where a sequence has outgrown it: nothing beyond its tables, and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_cospec.runners.v1_drafter import V1Drafter

CONTEXT = 8


@dataclass
class Metadata:
    """As much of vLLM's CommonAttentionMetadata as is changed."""

    slot_mapping: torch.Tensor


@pytest.mark.parametrize("outgrown", [True, False])
def test_positions_beyond_the_context_are_fed_as_one_within_it_and_written_nowhere(outgrown: bool) -> None:
    positions = torch.tensor([5, 6, 7, 8, 9, 0, 1])  # of two requests, the first near the end
    wrapped: Any = V1Drafter.__new__(V1Drafter)
    wrapped._drafter = SimpleNamespace(max_model_len=CONTEXT, _get_positions=lambda n: positions[:n])
    wrapped._outgrown = torch.tensor([True, False]) if outgrown else None
    given = Metadata(torch.arange(40, 50))
    wrapped._set_inputs_first_pass = lambda: (7, torch.tensor([4, 6]), given)
    _, _, metadata = wrapped.set_inputs_first_pass()
    assert positions.tolist() == ([5, 6, 7, 0, 0, 0, 1] if outgrown else [5, 6, 7, 8, 9, 0, 1])
    if outgrown:
        assert metadata.slot_mapping.tolist() == [40, 41, 42, -1, -1, 45, 46]
    else:
        assert metadata is given
