"""Fixtures of the tests that interpret kernels."""

from __future__ import annotations

from typing import Any

import arbitration_cases as cases
import pytest
import torch


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what arbitration allocates with NaN or a sentinel, so that a read of unwritten memory shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else cases.POISON)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
