"""What training and evaluation may tell a worker, through vLLM's ``collective_rpc``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_cospec import reports, watch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_cospec.kernels.policies import Policy
    from vllm_cospec.runners.base import ArbitratingSampler
    from vllm_cospec.runners.trace import Decision


class Control:
    """Mixed into the workers; ``cospec`` is the runner's sampler."""

    cospec: ArbitratingSampler

    vllm_config: Any

    def execute_model(self, scheduler_output: Any) -> Any:
        """As vLLM's; the scheduler says whether everything is verified strictly."""
        self.cospec.strict = watch.strict(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's; the output carries what was counted of its requests, where that was asked for."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self.vllm_config.speculative_config.cospec.counts_requests:
            output = reports.attach(output, self.cospec.request_counts())
        return output

    def cospec_describe(self) -> dict[str, Any]:
        """Return what is served: ``lossy``, and the settings, see :meth:`vllm_cospec.config.Settings.described`."""
        return self.vllm_config.speculative_config.cospec.described()

    def cospec_set_arbiter(self, state_dict: dict[str, Tensor], sample_actions: bool) -> None:
        """Replace the arbiter's weights in memory.

        Args:
            state_dict: of :class:`vllm_cospec.arbiter.Arbiter`.
            sample_actions: draw actions with the arbiter's probability instead of comparing with the threshold.
        """
        self.cospec.set_arbiter(state_dict)
        self.cospec.sample_actions = sample_actions

    def cospec_set_policy(self, policy: Policy) -> None:
        """Replace a rule by another one."""
        self.cospec.set_policy(policy)

    def cospec_take_decisions(self) -> list[Decision]:
        """Return what was recorded since the last call, and forget it."""
        return self.cospec.take_decisions()
