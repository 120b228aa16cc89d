"""Units of numbers, and an actor that squares them and does not survive some."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from vllm_cospec.errors import RewardError
from vllm_cospec.training.rollout.pool import Pool

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find this folder


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
        self._directory = Path(directory)
        (self._directory / f"start-{time.monotonic_ns()}").touch()
        starts = len(list(self._directory.glob("start-*")))
        if start == "badly" or (start == "not twice" and starts in (2, 3)):
            os._exit(1)

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
            if number == 99 or (number == 50 and not (self._directory / "fifty").exists()):
                (self._directory / "fifty").touch()
                time.sleep(3600)
            if number == -1:
                raise RewardError("reward of '-1': raised ValueError: no")
            if number == -2 or (number == -3 and not (self._directory / "three").exists()):
                (self._directory / "three").touch()
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return [(number * number, weights) for number in unit.numbers]


def pool(directory: Path, size: int = 2, start: str = "well", **options: Any) -> Pool:
    actor = ray.remote(Squarer).options(num_cpus=0.1)
    return Pool(lambda: actor.remote(str(directory), start), size, **options)


def units(count: int, *special: int) -> list[Numbers]:
    plain = [Numbers(i, (1000 + i, 2000 + i)) for i in range(count)]
    for i, number in enumerate(special):
        plain[i + 1] = Numbers(i + 1, (3000, number, 4000))
    return plain
