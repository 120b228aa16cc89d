"""Times on a device: medians over repeated calls, each from a cold cache, and those of the stages within a call."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.triton_utils import tl, triton

_COLD = 2**28  # bytes written between calls, more than the caches of today's GPUs hold
_AHEAD = 24  # times that they are written, so long that the host has launched a whole call before the device begins it


@triton.jit
def read_kernel(out_ptr, rows_ptr, stride, width, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read rows once and keep their maxima: no verification can be faster."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    values = tl.load(rows_ptr + row * stride + offsets, mask=offsets < width, other=-float("inf"))
    tl.store(out_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.max(values.to(tl.float32), axis=0))


def read_once(rows: torch.Tensor) -> Callable[[], None]:
    """Return a call that reads [R, V] logits once."""
    num_rows, width = rows.shape
    grid = (num_rows, triton.cdiv(width, 8192))
    out = torch.empty(grid, device=rows.device)
    return lambda: read_kernel[grid](out, rows, rows.stride(0), width, BLOCK_SIZE=8192)


class Clock:
    """Takes times on one CUDA or ROCm device."""

    def __init__(self, device: torch.device, repetitions: int = 20):
        self._repetitions = repetitions
        self._cold = torch.empty(_COLD, dtype=torch.int8, device=device)

    def _chill(self) -> None:
        """Keep the device busy and its caches cold."""
        for _ in range(_AHEAD):
            self._cold.zero_()

    def median_us(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Return the medians of what a call takes on the device and of what the host is busy with it, microseconds.

        The device's time is that of launches that lie ready, as in an engine, where the model's forward pass comes
        before; what the host needs for them is in the other number.
        """
        for _ in range(3):
            call()  # compiles, and warms up
        torch.cuda.synchronize()
        on_device, on_host = [], []
        for _ in range(self._repetitions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._chill()
            start.record()
            began = time.perf_counter()
            call()
            on_host.append(1e6 * (time.perf_counter() - began))
            end.record()
            end.synchronize()
            on_device.append(1e3 * start.elapsed_time(end))
        return statistics.median(on_device), statistics.median(on_host)

    def stages_us(self, call: Callable[[], Any], modules: tuple[Any, ...]) -> dict[str, float]:
        """Return the median of every kernel of these modules that a call launches, microseconds."""
        call()
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(self._repetitions):
            self._chill()
            with timed_launches(modules) as events:
                call()
            torch.cuda.synchronize()
            for name, start, end in events:
                times[name].append(1e3 * start.elapsed_time(end))
        return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def timed_launches(modules: tuple[Any, ...], event: Callable[[], Any] | None = None) -> Iterator[list[Any]]:
    """Put events around every launch of a kernel found in these modules; yields (name, event before, event after)."""
    make = event or (lambda: torch.cuda.Event(enable_timing=True))
    events: list[Any] = []

    class Timed:
        def __init__(self, name: str, kernel: Any):
            self._name, self._kernel = name, kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                before, after = make(), make()
                before.record()
                self._kernel[grid](*args, **kwargs)
                after.record()
                events.append((self._name, before, after))

            return launch

    replaced = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and hasattr(kernel, "run")
    ]
    for module, name, kernel in replaced:
        setattr(module, name, Timed(name, kernel))
    try:
        yield events
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)
