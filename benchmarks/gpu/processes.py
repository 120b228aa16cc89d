"""Work in several processes: most of what the kit takes on a GPU is compiling, which a single core does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from vllm_cospec.parent import end_with

Item = TypeVar("Item")
Result = TypeVar("Result")


def available() -> int:
    """Return how many processes to use: each holds a context of the GPU, about half a GiB."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def new_interpreters(workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes that share nothing with this one, and end with it."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with, initargs=(os.getpid(),))


def spread(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """Return ``work`` of every item, in order; in this process with one worker.

    Args:
        work: a function of a module.
        items: what it is called with, once each; can be pickled.
        workers: how many processes.
    """
    if workers == 1:
        return [work(item) for item in items]
    root = str(Path(__file__).resolve().parents[2])
    sys.path.append(root)  # where the processes find this package, which then takes the path out again, as it did here
    try:
        with new_interpreters(workers) as pool:
            return list(pool.map(work, items))
    finally:
        sys.path.remove(root)
