"""The pool's contract: every unit is counted once, whatever happens to the actors. Real Ray, actors without engines."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from squares import Numbers, Squarer, pool, units

from vllm_cospec.errors import RewardError, TrainingError
from vllm_cospec.training.rollout.pool import Pool

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find what it imports
pytestmark = pytest.mark.usefixtures("ray_here")


def test_results_come_in_the_order_of_the_keys_and_carry_the_weights(tmp_path: Path) -> None:
    with pool(tmp_path) as workers:
        work = units(9)
        workers.submit(work, payload=5)
        results = workers.collect([unit.key for unit in work])
    assert results == [[[(n * n, 5) for n in unit.numbers]] for unit in work]


def test_a_lost_actor_is_replaced_and_its_work_is_counted_once(tmp_path: Path) -> None:
    said: list[str] = []
    with pool(tmp_path, notice=said.append) as workers:
        work = units(8, 7)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
        assert workers.losses == 1
        assert not workers.set_aside
    assert results == [[[(n * n, 1) for n in unit.numbers]] for unit in work]
    assert len(said) == 1
    assert "another takes over" in said[0]


def test_a_prompt_that_always_kills_is_set_aside_and_its_neighbours_are_not(tmp_path: Path) -> None:
    with pool(tmp_path, attempts=2) as workers:
        work = units(5, 13)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
        assert workers.set_aside == [Numbers(1, (13,))]
    assert results[1] == [[(3000 * 3000, 1)], [(4000 * 4000, 1)]]
    assert [len(result) for result in results] == [1, 2, 1, 1, 1]


def test_an_actor_that_hangs_is_replaced(tmp_path: Path) -> None:
    with pool(tmp_path, attempts=1, unit_timeout_s=3) as workers:
        workers.wait_until_ready()
        work = units(4, 99)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
        assert workers.set_aside == [Numbers(1, (99,))]
    assert len(results[1]) == 2


def test_an_actor_killed_from_outside_loses_nothing(tmp_path: Path) -> None:
    with pool(tmp_path) as workers:
        workers.wait_until_ready()
        work = units(40)
        workers.submit(work, payload=1)
        killed: list[bool] = []

        def kill_one(result: Any) -> None:
            if not killed:
                killed.append(True)
                ray.kill(workers._actors[0].handle)

        results = workers.collect([unit.key for unit in work], tick=kill_one)
    assert results == [[[(n * n, 1) for n in unit.numbers]] for unit in work]


def test_what_is_wrong_on_every_actor_ends_the_run_by_name(tmp_path: Path) -> None:
    with pool(tmp_path) as workers:
        workers.submit([Numbers(0, (-1,))])
        with pytest.raises(RewardError, match="reward of '-1': raised ValueError: no"):
            workers.collect([0])


def test_an_exception_in_an_actor_is_retried_on_a_fresh_one_and_then_set_aside(tmp_path: Path) -> None:
    said: list[str] = []
    with pool(tmp_path, attempts=2, notice=said.append) as workers:
        work = units(6, -3, -2)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
        assert workers.set_aside == [Numbers(2, (-2,))]
    assert sorted(n for part in results[1] for n, _ in part) == [9, 9_000_000, 16_000_000]
    assert results[2] == [[(3000 * 3000, 1)], [(4000 * 4000, 1)]]
    assert [len(result) for result in results[3:]] == [1, 1, 1]
    lost = next(line for line in said if line.startswith("an actor was lost"))
    assert "raised RuntimeError: CUDA out of memory. Tried to allocate 2 GiB" in lost
    assert "lower pair.engine.gpu_memory_utilization or pair.engine.max_num_seqs" in lost


def test_a_run_ends_with_the_reason_when_every_prompt_loses_its_actor(tmp_path: Path) -> None:
    with pool(tmp_path, attempts=1) as workers:
        workers.submit([Numbers(i, (-2,)) for i in range(20)])
        with pytest.raises(TrainingError, match=r"6 actors in a row were lost .* raised RuntimeError: CUDA"):
            workers.collect(range(20))


def test_engines_that_cannot_start_are_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    with (
        pool(tmp_path, start="badly", attempts=2, pause_s=0.1) as workers,
        pytest.raises(TrainingError, match="cannot be started"),
    ):
        workers.wait_until_ready()


def test_a_replacement_that_does_not_start_is_tried_again_after_a_pause(tmp_path: Path) -> None:
    said: list[str] = []
    with pool(tmp_path, 1, start="not twice", attempts=3, pause_s=0.2, notice=said.append) as workers:
        work = units(4, 7)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
    assert results == [[[(n * n, 1) for n in unit.numbers]] for unit in work]
    assert [line.rpartition("; ")[2] for line in said[1:]] == [
        "it is tried again in 0.2 s, the others go on",
        "it is tried again in 0.4 s, the others go on",
    ]


def test_an_actor_that_never_comes_holds_no_work_hostage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_cospec.training.rollout.pool.GRACE_S", 0.5)
    said: list[str] = []
    actor = ray.remote(Squarer)
    cpus = iter([0.1, 100_000])
    with Pool(lambda: actor.options(num_cpus=next(cpus)).remote(str(tmp_path)), 2, notice=said.append) as workers:
        workers.wait_until_ready()
        work = units(6)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
    assert results == [[[(n * n, 1) for n in unit.numbers]] for unit in work]
    assert said == ["1 of 2 actors are ready and begin; the others join them"]


def test_a_straggler_is_done_by_a_second_actor_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_cospec.training.rollout.pool.SLOW_AFTER_S", 1.0)
    said: list[str] = []
    with pool(tmp_path, notice=said.append) as workers:
        workers.wait_until_ready()
        work = units(6, 50)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
        assert workers.losses == 0
    assert results == [[[(n * n, 1) for n in unit.numbers]] for unit in work]
    assert all("takes longer than 1 s and goes to a second actor" in line for line in said)
    assert "unit 1" in [line.partition(" takes longer")[0] for line in said]
    assert len(said) <= 2  # the unit that waited behind it may have gone along


@ray.remote(num_cpus=0.1)
def slow() -> None:
    time.sleep(3600)


class Keeper:
    """Owns a result that is not there yet; without its owner it never will be."""

    def keep(self) -> list[Any]:
        return [slow.remote()]


class Forgetful:
    """An actor of which one result cannot be had, because the process that owned it is gone."""

    def __init__(self, directory: Path) -> None:
        self._squarer: Any = ray.remote(Squarer).options(num_cpus=0.1).remote(str(directory))
        self.ready, self.work, self._lost = self._squarer.ready, self, False

    def remote(self, unit: Numbers, payload: int) -> Any:
        reference = self._squarer.work.remote(unit, payload)
        if unit.index == 2 and not self._lost:
            self._lost = True
            keeper: Any = ray.remote(Keeper).options(num_cpus=0.1).remote()
            (reference,) = ray.get(keeper.keep.remote())
            ray.kill(keeper)
        return reference


def test_a_result_that_is_lost_on_its_way_is_made_again_by_the_same_actor(tmp_path: Path) -> None:
    said: list[str] = []
    with Pool(lambda: Forgetful(tmp_path), 1, notice=said.append) as workers:
        work = units(6)
        workers.submit(work, payload=1)
        results = workers.collect([unit.key for unit in work])
        assert workers.losses == 0
    assert results == [[[(n * n, 1) for n in unit.numbers]] for unit in work]
    assert [line.partition(" (")[0] for line in said] == ["a result was lost"]
    assert said[0].endswith("; its unit is repeated")
    assert len(list(tmp_path.glob("*-2"))) == 2
    assert len(list(tmp_path.glob("start-*"))) == 1


class Simulated:
    """Many actors' worth of latency in one process: what the driver has to keep up with, without the engines."""

    def __init__(self) -> None:
        self._actors: dict[int, asyncio.Lock] = {}
        self._busy: list[tuple[float, float]] = []

    async def ready(self) -> bool:
        return True

    async def work(self, unit: Numbers, seconds: float, actor: int) -> int:
        async with self._actors.setdefault(actor, asyncio.Lock()):
            began = time.time()
            await asyncio.sleep(seconds * random.Random(unit.index).lognormvariate(0, 0.3))
            self._busy.append((began, time.time()))
        return unit.index

    async def busy(self) -> list[tuple[float, float]]:
        return self._busy


class Handle:
    """One simulated actor."""

    def __init__(self, process: Any, actor: int) -> None:
        self.ready, self.work = process.ready, self
        self._work, self._actor = process.work, actor

    def remote(self, unit: Numbers, seconds: float) -> Any:
        return self._work.remote(unit, seconds, self._actor)


@pytest.mark.slow  # measures time
def test_the_driver_keeps_256_actors_busy() -> None:
    """Units of some seconds, as spread as engines' are: while there is work, no more than a tenth may stand idle."""
    size, per_actor, seconds = 256, 6, 4.0
    processes: list[Any] = [
        ray.remote(Simulated).options(num_cpus=0.1, max_concurrency=1000).remote() for _ in range(4)
    ]
    ray.get([process.ready.remote() for process in processes])
    handles = iter([Handle(processes[i % 4], i) for i in range(size)])
    work = [Numbers(i, ()) for i in range(size * per_actor)]
    with Pool(lambda: next(handles), size) as workers:
        workers.wait_until_ready()
        workers.submit(work, payload=seconds)
        results = workers.collect([unit.key for unit in work])
        spans = [span for process in processes for span in ray.get(process.busy.remote())]
    assert results == [[unit.index] for unit in work]
    first = min(began for began, _ in spans)
    last = sorted(began for began, _ in spans)[-size]  # from here on there is not enough work left for everybody
    busy = sum(max(0.0, min(end, last) - began) for began, end in spans if began < last)
    share = busy / (size * (last - first))
    print(f"{size} simulated actors, units of {seconds} s: busy {share:.3f} of {last - first:.1f} s")
    assert share >= 0.9
