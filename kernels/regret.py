"""What an override gives up, and the budget that bounds it.

The regret of keeping d at a position is log p(t*) - log p(d), with p the softmax of the raw target logits: the
difference of the two logits, taken in float32. It is never negative, and 0 for a tie. The sum over the overrides of a
response never exceeds ``max_regret``: a mismatch whose regret does not fit into what is left is verified strictly,
and so is every one where the budget is 0, ties included.

So that the sum is the same number on every path, in whatever order and precision it is added up, regrets are rounded
up and budgets down to multiples of ``REGRET_UNIT``. float32 holds all of them, and their sums, up to twice
``MAX_REGRET``.

See docs/loss.md for ASD (arXiv 2608.03447), which spends such a budget as well.
"""

from __future__ import annotations

import math

REGRET_UNIT = 2.0**-10  # nats
MAX_REGRET = 2.0**13  # largest budget; more is no limit to speak of


def in_units(budget: float | None) -> float:
    """Return a budget as the paths compare it: rounded down to the unit; infinity for None, no limit."""
    return math.inf if budget is None else math.floor(budget / REGRET_UNIT) * REGRET_UNIT
