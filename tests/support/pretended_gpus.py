"""A platform of vLLM's that computes on the CPU and has Ray take its ranks for what runs on GPUs.

vLLM refuses Ray as executor on a CPU, where Ray has no device to count. With this, engines whose ranks are Ray actors
run on a machine without GPUs, in a cluster that pretends to have some.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class PretendedGpus(CpuPlatform):
    """vLLM's CPU platform, of which Ray counts GPUs."""

    ray_device_key = "GPU"


def platform() -> str:
    """Return where vLLM finds the platform."""
    return "pretended_gpus.PretendedGpus"
