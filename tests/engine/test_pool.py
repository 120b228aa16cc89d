"""The pool's contract: every unit is counted once, whatever happens to the actors. Real Ray, actors without engines."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from vllm_cospec.errors import RewardError, TrainingError
from vllm_cospec.training.rollout.pool import Pool

pytestmark = pytest.mark.usefixtures("ray_here")


@dataclass(frozen=True)
class Numbers:
    """A unit: numbers to be squared."""

    index: int
    numbers: tuple[int, ...]

    @property
    def key(self) -> int:
        return self.index

    def split(self) -> list[Numbers]:
        return [Numbers(self.index, (number,)) for number in self.numbers]


class Squarer:
    """An actor that squares, and does not survive some numbers."""

    def __init__(self, directory: str, start: str = "well") -> None:
        if start != "well":
            os._exit(1)
        self._directory = Path(directory)

    def ready(self) -> bool:
        return True

    def work(self, unit: Numbers, weights: int) -> list[tuple[int, int]]:
        (self._directory / f"{time.monotonic_ns()}-{unit.index}").touch()
        for number in unit.numbers:
            if number == 13:  # always deadly
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 7 and not (self._directory / "seven").exists():  # deadly once
                (self._directory / "seven").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 99:
                time.sleep(3600)
            if number == -1:
                raise RewardError("reward of '-1': raised ValueError: no")
            if number == -2:
                raise ValueError("something else")
        return [(number * number, weights) for number in unit.numbers]


def pool(directory: Path, size: int = 2, start: str = "well", **options: Any) -> Pool:
    actor = ray.remote(Squarer).options(num_cpus=0.1)
    return Pool(lambda: actor.remote(str(directory), start), size, **options)


def units(count: int, *special: int) -> list[Numbers]:
    plain = [Numbers(i, (1000 + i, 2000 + i)) for i in range(count)]
    for i, number in enumerate(special):
        plain[i + 1] = Numbers(i + 1, (3000, number, 4000))
    return plain


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


def test_errors_of_the_work_itself_end_the_run_by_name(tmp_path: Path) -> None:
    for number, kind, message in (
        (-1, RewardError, "reward of '-1': raised ValueError: no"),
        (-2, TrainingError, "an actor failed: ValueError: something else"),
    ):
        with pool(tmp_path) as workers:
            workers.submit([Numbers(0, (number,))])
            with pytest.raises(kind, match=message):
                workers.collect([0])


def test_engines_that_cannot_start_are_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    with pool(tmp_path, start="badly", attempts=2) as workers, pytest.raises(TrainingError, match="cannot be started"):
        workers.wait_until_ready()


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
