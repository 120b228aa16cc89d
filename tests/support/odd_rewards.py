"""A reward that random models can earn."""

from __future__ import annotations

from typing import Any


def odd(problem: Any, text: str) -> float:
    """1.0 for a text whose characters sum to an odd number: any other token may change it."""
    return float(sum(map(ord, text)) % 2)
