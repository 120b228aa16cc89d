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

# The second: the store is full, and so is the disk that objects would be moved to.
_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)
_KILLED = "; it was killed for memory: lower rollout.actors or pair.engine.kv_cache_memory_bytes"
_NO_ROOM = (
    "; free the disk that holds TMPDIR, set ray_address to a cluster with a larger --object-store-memory, or lower "
    "rollout.prompts_per_unit"
)


def cause_of(error: Exception) -> Exception:
    """Return what went wrong inside of an actor, where that is what an error of Ray reports; else the error."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error


def is_full(error: Exception) -> bool:
    """Whether an object found no room in Ray's object store; where it was a result, actor and unit are well."""
    return isinstance(error, _FULL)


def is_of_the_actor(error: Exception) -> bool:
    """Whether the actor is lost; else its result is, or the way to it."""
    return not isinstance(error, _ELSEWHERE)


def said_by(error: Exception) -> str:
    """Return what an error says, shortened, with what to change where memory was short."""
    said = "Ray's object store is full" if is_full(error) else one_line(error)[:300]
    return said + reason_of(error)


def reason_of(error: Exception | None) -> str:
    """Return what to change, as the end of a sentence, where the error says that memory was short; else nothing."""
    said = f"{type(error).__name__} {one_line(error)}".lower() if error is not None else ""
    if error is not None and is_full(error):
        return _NO_ROOM
    # Ray's own error first: it has the name of PyTorch's, which is about a device
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return _KILLED
    if any(sign in said for sign in _DEVICE):
        return "; lower pair.engine.gpu_memory_utilization or pair.engine.max_num_seqs"
    return _KILLED if any(sign in said for sign in _MACHINE) else ""
