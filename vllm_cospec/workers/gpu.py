"""The GPU worker, for CUDA and ROCm. Nothing touches the device when this module is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_cospec.workers.control import Control

if TYPE_CHECKING:
    from vllm_cospec.runners.base import DeviceSampler


class CoSpecGPUWorker(Control, Worker):
    """vLLM's GPU worker with arbitration installed once model, speculator and sampler exist."""

    cospec: DeviceSampler

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the models, then install and compile; vLLM's own warm-up and its JIT monitor come later.

        Raises:
            CompatibilityError: a setting cospec cannot be combined with.
        """
        super().load_model(load_dummy_weights=load_dummy_weights)
        if self.use_v2_model_runner:
            from vllm_cospec.runners.v2 import install
        else:
            from vllm_cospec.runners.v1_gpu import install  # type: ignore[assignment]

        self.cospec = install(
            self.model_runner,
            self.vllm_config.speculative_config.cospec,
            self.vllm_config.parallel_config.data_parallel_index,
        )
        self.cospec.warm_up()
        self.cospec.hold_counts()

    def compile_or_warm_up_model(self) -> Any:
        """Run vLLM's own warm-up, with requests that are nobody's, and count from there on."""
        times = super().compile_or_warm_up_model()
        self.cospec.start_counts()
        return times
