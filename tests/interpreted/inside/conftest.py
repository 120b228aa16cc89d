"""Fixtures of the tests that interpret kernels."""

from __future__ import annotations

from typing import Any

import arbitration_cases as cases
import pytest
import torch

from vllm_cospec.kernels.triton.workspace import Workspace


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what arbitration allocates with NaN or a sentinel, so that a read of unwritten memory shows.

    Scratch memory gets the sentinel: as a sum it is no distribution, as a count or a token none either, while NaN is
    what a kernel may rightly find there and take for a row that strict verification decides.
    """
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else cases.POISON)

    def allocate(self: Workspace, *args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(part.fill_(cases.POISON) for part in allocated(self, *args))

    allocated = Workspace._allocate
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(Workspace, "_allocate", allocate)
