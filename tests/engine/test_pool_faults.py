"""Faults that need a Ray of their own: its monitor of memory, and a cluster of several nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def by_itself(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that has no Ray yet."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip


MEMORY = """
import sys
import ray
from squares import Squarer, units
from vllm_cospec.errors import TrainingError
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import ray_session

actor = ray.remote(Squarer).options(num_cpus=0.1)
said = []
with ray_session(None, cpus=2):
    try:
        with Pool(lambda: actor.remote(sys.argv[1]), 1, attempts=1, notice=said.append, pause_s=0.1) as pool:
            pool.submit(units(2, 99))  # one that takes for ever
            pool.collect([0, 1])
    except TrainingError as error:
        said.append(str(error))
losses = [line for line in said if line.startswith(("an actor", "engines cannot"))]
assert losses, said
assert all("it was killed for memory: lower rollout.actors or pair.engine.kv_cache" in line for line in losses), said
print("named each time")
"""


@pytest.mark.timeout(300)
def test_an_actor_that_is_killed_for_memory_is_named_as_that(tmp_path: Path) -> None:
    """Ray's own monitor kills it: the limit is set to what any machine uses."""
    environment = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "200"}
    done = by_itself(MEMORY, str(tmp_path), **environment)
    assert "named each time" in done.stdout, done.stderr[-3000:]


CLUSTER = """
import sys
import ray
import time
from ray.cluster_utils import Cluster
from squares import Squarer, units
from vllm_cospec.training.rollout.pool import Pool

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)

class Slow(Squarer):
    def work(self, unit, weights):
        time.sleep(0.5)
        return super().work(unit, weights)

actor = ray.remote(Slow).options(num_cpus=1)
said, removed = [], []
with Pool(lambda: actor.remote(sys.argv[1]), 3, notice=said.append, pause_s=0.2, start_timeout_s=20) as pool:
    pool.wait_until_ready()
    work = units(30)
    pool.submit(work, payload=1)

    def remove(result):
        if not removed:
            removed.append(True)
            cluster.remove_node(nodes[0], allow_graceful=False)

    results = pool.collect([unit.key for unit in work], tick=remove)
ray.shutdown()
cluster.shutdown()
assert results == [[[(n * n, 1) for n in unit.numbers]] for unit in work], results
assert any("was lost" in line for line in said), said
print("as if nothing had happened")
"""


@pytest.mark.timeout(300)
def test_a_node_that_is_removed_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    done = by_itself(CLUSTER, str(tmp_path))
    assert "as if nothing had happened" in done.stdout, done.stderr[-3000:]
