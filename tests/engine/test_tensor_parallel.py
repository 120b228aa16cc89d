"""Two ranks that decide alike count once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from descendants import descendants
from ray.cluster_utils import Cluster

from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.pairs.demo import PLANS, build_model, build_tokenizer
from vllm_cospec.training.rollout.actors import RolloutActor
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.placement import Placed
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import ray_session
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import load_task

RunEngine = Callable[..., dict[str, Any]]


def write_model(directory: Path, seed: int) -> Path:
    """A random model whose heads two ranks can share; its own output matrix keeps it from repeating its last token."""
    tokenizer = build_tokenizer()
    shape = dataclasses.replace(
        PLANS["draft"], seed=seed, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2
    )
    model = build_model(shape, len(tokenizer))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_two_ranks_count_as_one(
    tmp_path: Path, prompts: list[str], run_engine: RunEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM gives each rank a NUMA node of its own otherwise
    target, draft = write_model(tmp_path / "target", 1), write_model(tmp_path / "draft", 2)
    # chosen so that draft and target disagree almost always, and half of the drafts are kept
    config = {
        "method": "cospec", "model": str(draft), "num_speculative_tokens": 4,
        "arbiter": {"policy": "random", "rate": 0.5},
    }  # fmt: skip
    runs = [
        {"name": "run", "prompts": prompts[:20], "params": {"temperature": 0, "max_tokens": 40, "ignore_eos": True}}
    ]
    one, two = (run_engine(runs, config, model=str(target), tensor_parallel_size=ranks) for ranks in (1, 2))
    assert one["runs"] == two["runs"]
    counted = {name: value for name, value in one["metrics"].items() if name.startswith("vllm:cospec")}
    assert counted == {name: value for name, value in two["metrics"].items() if name.startswith("vllm:cospec")}
    assert counted["vllm:cospec_num_overrides"] > 100
    assert two["described"] == 2 * one["described"]
    assert one["described"][0]["lossy"]
    accepted = two["metrics"]["vllm:spec_decode_num_accepted_tokens"]
    assert counted["vllm:cospec_num_overrides"] <= accepted


def rolled_out(config: TrainConfig, units: list[Unit], harmed: str = "") -> Episodes:
    """What an actor makes of units; after the first of them a process whose name contains ``harmed`` is killed."""
    killed: list[int] = []

    def harm(result: object) -> None:
        if harmed and not killed:
            named = descendants(naming=harmed)
            assert len(named) == config.pair.ranks
            named[-1].kill()
            killed.append(named[-1].pid)

    weights = Learner(config.learner, config.seed, 1).weights()
    actor = Placed(RolloutActor, config.pair, config.rollout)
    with Pool(lambda: actor.remote(config, weights), 1) as pool:
        pool.submit(units, ray.put(weights))
        found = pool.collect([unit.key for unit in units], tick=harm)
        assert (pool.losses, pool.set_aside) == (len(killed), [])
    return Episodes.merge([episodes for parts in found for episodes in parts])


@contextlib.contextmanager
def pretended_gpus(directory: Path) -> Iterator[str]:
    """A cluster with two pretended GPUs, on which engines may have Ray actors for ranks; yields its address."""
    package = directory / "pretended_gpus-1.0.dist-info"  # by which vLLM finds tests/support/pretended_gpus.py
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: pretended_gpus\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.platform_plugins]\npretended_gpus = pretended_gpus:platform\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(directory), *filter(None, sys.path)]))
        cluster = Cluster(True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ray_actors", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_actor_with_two_ranks_decides_and_counts_as_with_one(
    ray_actors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks are its child processes, or Ray actors in a placement group of its own, of which one is killed."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    target, draft = write_model(tmp_path / "target", 1), write_model(tmp_path / "draft", 2)
    engine = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 16, "enforce_eager": True,
              "kv_cache_memory_bytes": 2**26}  # fmt: skip
    problems = tuple(load_task("demo").problems(5, 10, "train"))
    units = [Unit(0, 0, problems[:2], 0, seed=1), Unit(0, 1, problems[2:], 2, seed=1)]
    found = []
    there = pretended_gpus(tmp_path / "platform") if ray_actors else contextlib.nullcontext(None)
    with there as address, ray_session(address, cpus=4):
        for ranks in (1, 2):
            own: dict[str, Any] = {"tensor_parallel_size": ranks}
            gpus = 0
            if ray_actors and ranks > 1:
                own |= {"distributed_executor_backend": "ray"}
                gpus = ranks
            config = TrainConfig.model_validate(
                {
                    "pair": {
                        "target": str(target), "draft": str(draft), "num_speculative_tokens": 4,
                        "engine": engine | own,
                    },
                    "rollout": {
                        "cpus_per_actor": float(ranks), "gpus_per_actor": float(gpus), "max_tokens": 40,
                        "branches_per_response": 2,
                    },
                    # as likely to keep as not, whatever it sees: sums in another order change no decision
                    "learner": {"initial_keep": 0.5},
                }
            )  # fmt: skip
            found.append(rolled_out(config, units, "ray::RayWorkerProc" if gpus else ""))
    one, two = found
    assert one.texts == two.texts
    for name in ("tokens", "steps", "episode", "kept", "output_position", "branch_decision", "branch_weight",
                 "branch_keep", "branch_drop", "branch_keep_saved", "branch_drop_saved"):  # fmt: skip
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    np.testing.assert_allclose(one.statistics, two.statistics, rtol=1e-4, atol=1e-4)
    assert (one.continuations, one.discarded) == (two.continuations, two.discarded)
    assert 50 < one.kept.sum() < len(one.kept) - 50
    assert len(one.branch_decision) > 10
