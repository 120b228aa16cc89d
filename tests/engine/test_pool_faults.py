"""Faults that need a Ray of their own: its monitor of memory, and a cluster of several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_process import by_itself

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
with Pool(lambda: actor.remote(sys.argv[1]), 3, notice=said.append, pause_s=0.2, start_timeout_s=60) as pool:
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


FULL = """
import sys
import time
import numpy as np
import ray
from ray.cluster_utils import Cluster
from squares import Squarer, units
from vllm_cospec.errors import TrainingError
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import ray_session

MIB = 2**20
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * MIB,
})

class Large(Squarer):
    def work(self, unit, mib):
        time.sleep(0.2)
        return super().work(unit, mib), np.full(mib * MIB, unit.index, np.uint8)

actor = ray.remote(Large).options(num_cpus=0.1)
said, taken = [], []

def notice(text):
    said.append(text)
    taken.clear()

def run():
    with Pool(lambda: actor.remote(sys.argv[1]), 1, attempts=5, notice=notice) as pool:
        pool.wait_until_ready()
        taken.append(ray.put(np.zeros(60 * MIB, np.uint8)))  # no room for a result, until the first was lost
        work = units(8)
        pool.submit(work, payload=25)
        results = pool.collect([unit.key for unit in work])  # all at once they are larger than the store
        assert pool.losses == 0 and not pool.set_aside, said
    assert [part for ((part, _),) in results] == [[(n * n, 25) for n in unit.numbers] for unit in work]
    assert all((array == i).all() for i, ((_, array),) in enumerate(results))
    print("went on:", said[0])
    try:
        with Pool(lambda: actor.remote(sys.argv[1]), 1, attempts=2) as pool:
            pool.submit(units(2), payload=100)
            pool.collect([0, 1])
    except TrainingError as error:
        print("ended:", error)
    ray.put(np.zeros(100 * MIB, np.uint8))

try:
    with ray_session(cluster.address, cpus=1):
        run()
except TrainingError as error:
    print("ended:", error)
cluster.shutdown()
"""


@pytest.mark.timeout(300)
def test_where_the_object_store_is_full_a_run_goes_on_or_ends_with_what_to_raise(tmp_path: Path) -> None:
    """A store of 80 MiB, and a disk that Ray takes for full; no result is counted twice, no healthy actor is lost."""
    environment = {"RAY_local_fs_capacity_threshold": "0.0", "RAY_automatic_object_spilling_enabled": "0"}
    done = by_itself(FULL, str(tmp_path), **environment)
    way_out = (
        "Ray's object store is full; free the disk that holds TMPDIR, set ray_address to a cluster with a larger "
        "--object-store-memory, or lower rollout.prompts_per_unit"
    )
    assert done.stdout.splitlines() == [
        f"went on: a result was lost ({way_out}); its unit is repeated",
        f"ended: rollout: the result of unit 0 found no room 2 times: {way_out}",
        f"ended: Ray failed: {way_out}",
    ], done.stderr[-3000:]
