"""Where engines of several GPUs run, and that nothing stays reserved: clusters of pretended GPUs, real kills."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_process import by_itself

BEGIN = """
import os, signal, subprocess, sys, time
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from squares import Squarer, units
from vllm_cospec.errors import TrainingError
from vllm_cospec.training.config import PairConfig, RolloutConfig
from vllm_cospec.training.rollout.placement import Placed, end
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import ray_session, say_what_others_use

ENGINE = {"tensor_parallel_size": 2}
RAY = {"distributed_executor_backend": "ray"}
ROLLOUT = RolloutConfig(actors=2, cpus_per_actor=0.5, gpus_per_actor=2)

def placed(actor, **engine):
    pair = PairConfig(target="target", draft="draft", num_speculative_tokens=3, engine=ENGINE | engine)
    return Placed(actor, pair, ROLLOUT)

class Slow(Squarer):
    def where(self):
        return ray.get_runtime_context().get_node_id(), len(ray.get_gpu_ids())
    def work(self, unit, weights):
        time.sleep(0.3)
        return super().work(unit, weights)

class Rank:
    def where(self):
        return ray.get_runtime_context().get_node_id(), len(ray.get_gpu_ids())

class WithRanks(Slow):
    '''Starts its ranks as vLLM does: one on each bundle of the group that it finds itself in.'''
    def __init__(self, directory):
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Strategy
        super().__init__(directory)
        group = ray.util.get_current_placement_group()
        self.ranks = [
            ray.remote(Rank).options(num_cpus=0, num_gpus=1, scheduling_strategy=Strategy(group, index)).remote()
            for index in range(group.bundle_count)
        ]
    def ready(self):
        return len(self.where()) == 3
    def where(self):
        return super().where(), *ray.get([rank.where.remote() for rank in self.ranks])

class NeverStarts(Slow):
    def ready(self):
        raise RuntimeError("CUDA out of memory")

def groups():
    return [found for found in placement_group_table().values() if found["state"] != "REMOVED"]

def eventually(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, (groups(), ray.available_resources(), said)
        time.sleep(0.1)

def nothing_is_held():
    def all_is_free():
        there = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        return not groups() and ray.available_resources().get("GPU", 0) == there
    eventually(all_is_free)

said = []
"""

GROUPS = (
    BEGIN
    + """
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 3, "include_dashboard": False})
node = cluster.add_node(num_cpus=2, num_gpus=3, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)
both = {own["NodeID"] for own in ray.nodes()}
work = units(16)
expected = [[[(n * n, 1) for n in unit.numbers]] for unit in work]

# Without ranks that are Ray actors: an actor's own request keeps its engine on one node, and needs no group.
plain = placed(Slow)
with Pool(lambda: plain.remote(sys.argv[1]), 2, notice=said.append) as pool:
    pool.wait_until_ready()
    found = [ray.get(actor.handle.where.remote()) for actor in pool._actors]
    assert {node for node, _ in found} == both and {count for _, count in found} == {2}, found
    assert not groups()
nothing_is_held()

# With a group for each: its ranks have the GPUs, all of one node.
maker = placed(WithRanks, **RAY)
with Pool(lambda: maker.remote(sys.argv[1]), 2, notice=said.append, pause_s=0.2, start_timeout_s=60) as pool:
    pool.wait_until_ready()
    found = [ray.get(actor.handle.where.remote()) for actor in pool._actors]
    assert {where for (where, _), *_ in found} == both
    assert all(own == (where, 0) and ranks == [(where, 1)] * 2 for own, *ranks in found for where in own[:1]), found
    third = maker.remote(sys.argv[1])  # a GPU of each node is free, which are not two of one node
    assert [own["strategy"] for own in groups()] == ["STRICT_PACK"] * 3
    assert sorted(own["state"] for own in groups()) == ["CREATED", "CREATED", "PENDING"]
    end(third)
    told = []  # another run that joins now
    say_what_others_use(2, 0.5, 2, told.append)
    assert told == [
        "2 of the cluster's 6 GPUs are free, and 2 engines need 4; those without room join when more are free"
    ]
    eventually(lambda: len(groups()) == 2)
    stays = next(place for place, ((where, _), *_) in enumerate(found) if where != node.node_id)
    happened = []
    def harm(result):
        happened.append(result)
        if len(happened) == 4:
            ray.kill(pool._actors[stays].handle.actor)
        if len(happened) == 8:  # the other node has no two GPUs more: this place waits, and holds nothing hostage
            cluster.remove_node(node, allow_graceful=False)
        assert len(groups()) <= 2, groups()
    pool.submit(work, payload=1)
    assert pool.collect([unit.key for unit in work], tick=harm) == expected
    assert pool.losses >= 2 and not pool.set_aside, said
nothing_is_held()

# One that does not start gives its group back before it is tried again.
maker = placed(NeverStarts, **RAY)
try:
    with Pool(lambda: maker.remote(sys.argv[1]), 1, attempts=1, notice=said.append, pause_s=0.2) as pool:
        pool.wait_until_ready()
except TrainingError as error:
    said.append(str(error))
assert said[-1].startswith("engines cannot be started: raised RuntimeError: CUDA out of memory; lower"), said
assert any("it is tried again in" in text for text in said), said
nothing_is_held()
ray.shutdown()
cluster.shutdown()
print("nothing is held")
"""
)

DRIVER = (
    BEGIN
    + """
maker = placed(WithRanks, **RAY)
with ray_session(sys.argv[2], 1), Pool(lambda: maker.remote(sys.argv[1]), 1) as pool:
    pool.wait_until_ready()
    print("ready", flush=True)
    pool.submit(units(2, 99), payload=1)  # one that takes for ever
    pool.collect([0, 1])
"""
)

STOPPED = (
    BEGIN
    + f"DRIVER = {DRIVER!r}"
    + """
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False)
for which in (signal.SIGINT, signal.SIGKILL):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, sys.argv[1], cluster.address], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout.readline() == "ready\\n"
    assert len(groups()) == 1 and ray.available_resources().get("GPU", 0) == 0
    driver.send_signal(which)
    driver.wait(60)
    nothing_is_held()
ray.shutdown()
cluster.shutdown()
print("nothing is held")
"""
)


@pytest.mark.timeout(300)
def test_an_engine_of_two_gpus_is_on_one_node_and_gives_back_what_it_had(tmp_path: Path) -> None:
    done = by_itself(GROUPS, str(tmp_path))
    assert "nothing is held" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_is_stopped_or_killed_leaves_no_group_on_the_cluster(tmp_path: Path) -> None:
    done = by_itself(STOPPED, str(tmp_path))
    assert "nothing is held" in done.stdout, done.stderr[-3000:]
