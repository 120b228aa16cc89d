"""The GPU worker, for CUDA and ROCm. Nothing touches the device when this module is imported."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_cospec.errors import CompatibilityError
from vllm_cospec.workers.control import Control


class CoSpecGPUWorker(Control, Worker):
    """vLLM's GPU worker with arbitration installed once model, speculator and sampler exist."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the models, then install and compile; vLLM's own warm-up and its JIT monitor come later.

        Raises:
            CompatibilityError: the engine chose Model Runner V1, or a setting cospec cannot be combined with.
        """
        super().load_model(load_dummy_weights=load_dummy_weights)
        if not self.use_v2_model_runner:
            raise CompatibilityError(
                "cospec runs on Model Runner V2 on a GPU, and vLLM chose V1; unset VLLM_USE_V2_MODEL_RUNNER and "
                "leave out what V2 does not support (vLLM's log names it)"
            )
        from vllm_cospec.runners.v2 import install

        self.cospec: Any = install(
            self.model_runner,
            self.vllm_config.speculative_config.cospec,  # type: ignore[union-attr]
            self.vllm_config.parallel_config.data_parallel_index,
        )
        self.cospec.warm_up()
