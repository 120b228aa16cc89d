"""What a worker may ask of the sampler it has installed, whichever runner it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_cospec.kernels.policies import Policy
    from vllm_cospec.reports import StepCounts
    from vllm_cospec.runners.trace import Decision


class ArbitratingSampler(Protocol):
    """A rejection sampler of vLLM's that consults a policy."""

    sample_actions: bool
    """Training: draw the action with the arbiter's probability instead of comparing with the threshold."""

    strict: bool
    """Whether every request is verified strictly."""

    def set_arbiter(self, state_dict: dict[str, Tensor]) -> None:
        """Replace the arbiter's weights in memory; takes effect at the next step."""

    def set_policy(self, policy: Policy) -> None:
        """Replace a rule by another; takes effect at the next step."""

    def take_decisions(self) -> list[Decision]:
        """Return what was recorded since the last call, and forget it."""

    def request_counts(self) -> Callable[[], StepCounts]:
        """Note what was counted of every request of the last step; the result returns it, by request id."""

    def warm_up(self) -> None:
        """Compile whatever serving would have to compile."""


class DeviceSampler(ArbitratingSampler, Protocol):
    """One that counts on the device."""

    def hold_counts(self) -> None:
        """Count nothing that comes until :meth:`start_counts`."""

    def start_counts(self) -> None:
        """Count from here on, and forget what was decided before."""
