"""What an error says about an actor: whether it is lost, and what can be done."""

import pytest
import ray.exceptions
import torch

from vllm_cospec.training.rollout.losses import is_of_the_actor, reason_of


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ray.exceptions.OutOfMemoryError("1 worker(s) were killed due to the node running low on memory"),
         "lower rollout.actors or pair.engine.kv_cache_memory_bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
         "lower pair.engine.gpu_memory_utilization or pair.engine.max_num_seqs"),
        (RuntimeError("HIP out of memory"), "lower pair.engine.gpu_memory_utilization or pair.engine.max_num_seqs"),
        (ray.exceptions.ObjectStoreFullError("the store is full"),
         "set ray_address to a cluster with a larger --object-store-memory, or lower rollout.prompts_per_unit"),
        (ray.exceptions.OutOfDiskError("the store is full and nothing can be spilled"),
         "set ray_address to a cluster with a larger --object-store-memory, or lower rollout.prompts_per_unit"),
        (MemoryError("out of memory"), "lower rollout.actors or pair.engine.kv_cache_memory_bytes"),
    ],
)  # fmt: skip
def test_where_memory_was_short_the_advice_is_about_that_memory(error: Exception, advice: str) -> None:
    assert reason_of(error).endswith(advice)


def test_other_errors_get_no_advice() -> None:
    assert reason_of(RuntimeError("NCCL timeout")) == ""
    assert reason_of(None) == ""


def test_what_concerns_a_result_does_not_condemn_the_actor() -> None:
    assert is_of_the_actor(ray.exceptions.OutOfMemoryError("killed"))
    assert is_of_the_actor(ray.exceptions.ActorDiedError())
    for elsewhere in (
        ray.exceptions.ObjectStoreFullError("full"), ray.exceptions.OutOfDiskError("full"),
        ray.exceptions.GetTimeoutError("late"),
    ):  # fmt: skip
        assert not is_of_the_actor(elsewhere)
