"""What vLLM and cospec count while answers are generated. Imports nothing of either."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

_DRAFTS, _ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
_MISMATCHES, _OVERRIDES = "vllm:cospec_num_mismatches", "vllm:cospec_num_overrides"


@dataclass(frozen=True)
class Counts:
    """Sums over a run; two of them add up."""

    drafts: int = 0
    """Blocks verified, each in one target step."""
    accepted: int = 0
    """Draft tokens kept, overrides among them."""
    accepted_per_position: tuple[int, ...] = ()
    """The same by place in the block; empty where nobody counted them so."""
    mismatches: int = 0
    """Draft positions the policy was asked about."""
    overrides: int = 0
    """Those where the draft token was kept."""

    @classmethod
    def of_metrics(cls, values: Mapping[str, float]) -> Counts:
        """Read vLLM's counters by their names; those of a place in the block are called ``name[place]``."""
        places = sorted(
            (int(name[len(_PER_POSITION) + 1 : -1]), int(value))
            for name, value in values.items()
            if name.startswith(f"{_PER_POSITION}[")
        )
        return cls(
            int(values.get(_DRAFTS, 0)),
            int(values.get(_ACCEPTED, 0)),
            tuple(value for _, value in places),
            int(values.get(_MISMATCHES, 0)),
            int(values.get(_OVERRIDES, 0)),
        )

    @classmethod
    def of_responses(cls, tokens: np.ndarray, steps: np.ndarray, mismatches: int = 0, overrides: int = 0) -> Counts:
        """Count what responses were given, whatever their last block held beyond their ends.

        Args:
            tokens: int [n], of each response; the first one is the prompt's own and belongs to no block.
            steps: int [n], target steps that gave it any.
            mismatches, overrides: of all of them.
        """
        drafts, accepted = np.maximum(steps - 1, 0).sum(), (tokens - steps).sum()
        return cls(int(drafts), int(accepted), mismatches=mismatches, overrides=overrides)

    def __add__(self, other: Counts) -> Counts:
        pairs = itertools.zip_longest(self.accepted_per_position, other.accepted_per_position, fillvalue=0)
        return Counts(
            self.drafts + other.drafts,
            self.accepted + other.accepted,
            tuple(one + two for one, two in pairs),
            self.mismatches + other.mismatches,
            self.overrides + other.overrides,
        )

    def __sub__(self, earlier: Counts) -> Counts:
        pairs = itertools.zip_longest(self.accepted_per_position, earlier.accepted_per_position, fillvalue=0)
        return Counts(
            self.drafts - earlier.drafts,
            self.accepted - earlier.accepted,
            tuple(one - two for one, two in pairs),
            self.mismatches - earlier.mismatches,
            self.overrides - earlier.overrides,
        )

    def as_delivered(self, tokens: int, responses: int) -> Counts:
        """Return what a server has counted with only those drafts as accepted that are in its responses.

        A block that ends a response may reach beyond it. Steps without drafts, which vLLM does not count, are added
        as far as tokens are left that no block explains.

        Args:
            tokens: of all responses.
            responses: their number; the first token of each is the prompt's own and belongs to no block.
        """
        if not self.drafts:
            return self
        behind = tokens - responses
        steps = self.drafts + max(0, behind - self.drafts - self.accepted)
        return replace(self, drafts=steps, accepted=max(0, behind - steps))

    @property
    def acceptance_length(self) -> float:
        """Tokens per target step, 1 + accepted / drafts; 1 where nothing was drafted, as without speculation."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the blocks whose draft was kept at each place; empty where nothing was drafted."""
        return [count / self.drafts for count in self.accepted_per_position] if self.drafts else []

    @property
    def override_rate(self) -> float:
        """Overrides / mismatches; 0 where nobody was asked."""
        return self.overrides / self.mismatches if self.mismatches else 0.0
