"""The CPU worker. Importing vLLM's own changes ``torch.cuda``: this module is for hosts without a GPU."""

from __future__ import annotations

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_cospec.workers.control import Control

EXPAND_KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def expand_kernel(
    output_ptr: torch.Tensor,  # [N], written
    input_ptr: torch.Tensor,  # [B]
    cu_num_tokens_ptr: torch.Tensor,  # [B] inclusive sums
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int,
) -> None:
    """Repeat every request's value for each of its tokens, replacing one value by another.

    vLLM's CPU build hands its C++ version a converted copy of float32 and int32 outputs and drops the result, so
    that temperature, top-k and top-p of sampled requests are whatever the memory held.
    """
    values = torch.where(input_ptr == replace_from, replace_to, input_ptr).to(output_ptr.dtype)
    counts = cu_num_tokens_ptr.diff(prepend=cu_num_tokens_ptr.new_zeros(1)).long()
    output_ptr.copy_(values.repeat_interleave(counts))


def mend_expand_kernel() -> None:
    """Replace the broken kernel through vLLM's own registry. Idempotent.

    Call it after the platform has registered its kernels and before numba is loaded (by the ngram drafter): the
    registry scans all modules and trips over one of numba's.
    """
    from vllm.triton_utils import dispatcher

    if dispatcher._registry.get(EXPAND_KERNEL, (None, None))[1] is not expand_kernel:
        dispatcher.register_kernels({EXPAND_KERNEL: expand_kernel})


class CoSpecCPUWorker(Control, CPUWorker):
    """vLLM's CPU worker with arbitration installed once model, drafter and sampler exist."""

    def init_device(self) -> None:
        """Mend sampling, then build the runner."""
        mend_expand_kernel()
        super().init_device()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the models, then install; warm-up comes later and runs through the installed sampler."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        if self.use_v2_model_runner:
            from vllm_cospec.runners.v2 import install
        else:
            from vllm_cospec.runners.v1_cpu import install  # type: ignore[assignment]

        self.cospec = install(
            self.model_runner,
            self.vllm_config.speculative_config.cospec,
            self.vllm_config.parallel_config.data_parallel_index,
        )
        if not self.use_v2_model_runner:
            self.cospec.warm_up()
