"""Stock vLLM with its CPU sampling bug mended, and nothing else: what our strict mode is compared with."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_cospec.workers.cpu import mend_expand_kernel


class MendedCPUWorker(CPUWorker):
    """The stock CPU worker; temperature, top-k and top-p reach the right requests."""

    def init_device(self) -> None:
        """Mend, then build the runner."""
        mend_expand_kernel()
        super().init_device()
