"""What an error of Ray says about an actor: whether it is lost, and what a user can do."""

from __future__ import annotations

import ray

from vllm_cospec.errors import one_line

# Errors that concern an object, the store or the connection; the actor itself may be well.
_ELSEWHERE = (
    ray.exceptions.ObjectLostError,
    ray.exceptions.ObjectStoreFullError,
    ray.exceptions.OutOfDiskError,
    ray.exceptions.GetTimeoutError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.RaySystemError,
)
_DEVICE = ("cuda out of memory", "hip out of memory", "outofmemoryerror")
_MACHINE = ("memory monitor", "low on memory", "oom", "out of memory")

_KILLED = "; it was killed for memory: lower rollout.actors or pair.engine.kv_cache_memory_bytes"


def is_of_the_actor(error: Exception) -> bool:
    """Whether the actor is lost; else its result is, or the way to it."""
    return not isinstance(error, _ELSEWHERE)


def reason_of(error: Exception | None) -> str:
    """Return what to change, as the end of a sentence, where the error says that memory was short; else nothing."""
    said = f"{type(error).__name__} {one_line(error)}".lower() if error is not None else ""
    if isinstance(error, ray.exceptions.ObjectStoreFullError):
        return "; lower rollout.prompts_per_unit, or give Ray a larger object store"
    # Ray's own error first: it has the name of PyTorch's, which is about a device
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return _KILLED
    if any(sign in said for sign in _DEVICE):
        return "; lower pair.engine.gpu_memory_utilization or pair.engine.max_num_seqs"
    return _KILLED if any(sign in said for sign in _MACHINE) else ""
