"""Stock vLLM with two bugs of its sampling mended, and nothing else: what our strict mode is compared with."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_cospec.runners.seeds import SeededDrafts
from vllm_cospec.workers.cpu import mend_expand_kernel


class MendedCPUWorker(CPUWorker):
    """The stock CPU worker; temperature, top-k and top-p reach the right requests, and a seed reaches the drafts."""

    def init_device(self) -> None:
        """Mend, then build the runner."""
        mend_expand_kernel()
        super().init_device()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the models, then mend the drafter, where there is a model to draft with."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        if hasattr(self.model_runner.drafter, "_sample_from_logits"):
            self.seed_drafts()

    def seed_drafts(self) -> None:
        """Draw the drafts of seeded requests by their seeds."""
        SeededDrafts(self.model_runner)


class MendedDeviceWorker(MendedCPUWorker):
    """The same with the random numbers of a GPU."""

    def seed_drafts(self) -> None:
        """As the base's."""
        from vllm_cospec.runners.device_recorder import SeededDeviceDrafts

        SeededDeviceDrafts(self.model_runner)
