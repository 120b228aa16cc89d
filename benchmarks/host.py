"""What a verification step asks of the host: launches, allocations, other operations of torch's, and their time.

    python benchmarks/host.py [--batch 64] [--json FILE]

Nothing runs on a device: a launch does what Triton's own does before it calls the driver, it looks its program up by
the arguments. The driver's share, some microseconds a launch, is not in the figures; torch's operations run, on a CPU.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run
from benchmarks.kernel import NUM_DRAFT_TOKENS, VOCAB_SIZE, in_fresh_process
from vllm_cospec.training.measure.provenance import write_result

ALLOCATING = ("empty", "new_empty", "zeros", "new_zeros", "full", "ones", "empty_like", "clone", "arange", "_to_copy")


@dataclass
class HostWork:
    """What was asked for in one step."""

    launches: list[str] = field(default_factory=list)  # names of kernels
    allocations: list[str] = field(default_factory=list)  # names of torch's operations, likewise the next
    others: list[str] = field(default_factory=list)


class _Operations(TorchDispatchMode):
    """Notes torch's operations, but those that only look at a tensor in another way."""

    def __init__(self, work: HostWork):
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if not func.is_view:
            (self._work.allocations if name in ALLOCATING else self._work.others).append(name)
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], Any], *modules: Any) -> HostWork:
    """Run a step whose kernels lie in these modules, none of which is launched."""
    from benchmarks.offline import recorded_launches

    work = HostWork()
    with recorded_launches(*modules) as launches, _Operations(work):
        step()
    work.launches = [one.name for one in launches]
    return work


@contextlib.contextmanager
def looked_up(target: str, *modules: Any) -> Iterator[None]:
    """Let every launch of a kernel in these modules look its program up, as for one of ``offline.TARGETS``, no more."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from benchmarks.offline import TARGETS, replaced_kernels

    class Launcher:
        def __init__(self, kernel: Any):
            backend = make_backend(TARGETS[target])
            self._bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self._bind

    with replaced_kernels(Launcher, *modules):
        yield


def microseconds(step: Callable[[], Any], repetitions: int, *modules: Any) -> float:
    """Return the median of what the host needs for a step; kernels as for :func:`count`."""
    took = []
    with looked_up("sm_90", *modules):
        for _ in range(repetitions):
            began = time.perf_counter()
            step()
            took.append(1e6 * (time.perf_counter() - began))
    return statistics.median(took[repetitions // 10 :])


def steps(batch: int, vocab_size: int = VOCAB_SIZE, k: int = NUM_DRAFT_TOKENS) -> dict[str, Callable[[], Any]]:
    """Return a step of every kind on Model Runner V2: stock's, a rule's and a trained arbiter's."""
    import torch
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as stock

    from vllm_cospec.arbiter import Arbiter
    from vllm_cospec.kernels.policies import Learned, Policy, Typical
    from vllm_cospec.kernels.triton.launch import ServerShapes, arbitrate
    from vllm_cospec.kernels.triton.policies import compile_policy
    from vllm_cospec.kernels.triton.step import Memory, Rows, Sampling
    from vllm_cospec.kernels.triton.workspace import Workspace

    cpu, rows = torch.device("cpu"), batch * (k + 1)
    raw = torch.empty(rows, vocab_size, dtype=torch.bfloat16)
    draft = torch.empty(batch, k, vocab_size, dtype=torch.bfloat16)
    drafted, first = torch.ones(rows, dtype=torch.int32), torch.arange(0, rows + 1, k + 1, dtype=torch.int32)
    request_slot, slot = torch.arange(batch), torch.arange(batch).repeat_interleave(k + 1)
    step, position = torch.arange(k + 1, dtype=torch.int32).repeat(batch), torch.arange(k + 1).repeat(batch)
    sampling = Sampling(torch.zeros(batch), torch.zeros(batch, dtype=torch.int64))
    slots = ServerShapes(vocab_size, torch.bfloat16, draft, k, cpu).slots()
    memory = Memory(torch.zeros(k + 1, dtype=torch.int64), Workspace(cpu, vocab_size, rows, batch))

    def ours(policy: Policy, arbiter: Arbiter | None = None) -> Callable[[], Any]:
        program = compile_policy(policy, cpu, arbiter)
        return lambda: arbitrate(
            Rows(raw, raw, draft, drafted, first, position, request_slot, slot, step, k),
            sampling,
            slots,
            program,
            memory,
        )

    return {
        "stock": lambda: stock.rejection_sample(
            raw, draft, drafted, first, position, request_slot, slot, step, sampling.temperature, sampling.seed, k
        ),
        "a rule": ours(Typical()),
        "learned": ours(Learned(artefact="-"), Arbiter((32, 32))),
    }


def measure(batch: int, repetitions: int) -> list[dict[str, Any]]:
    """Count and time every kind of step."""
    from vllm_cospec.kernels.triton.stand_in import install

    install()  # before vLLM is imported, which is why this runs in a process of its own
    from benchmarks.variants import MODULES

    found = []
    for name, step in steps(batch).items():
        work = count(step, *MODULES)
        found.append(
            {"step": name, "launches": work.launches, "allocations": len(work.allocations), "others": work.others,
             "host_us": microseconds(step, repetitions, *MODULES)}
        )  # fmt: skip
    return found


def main(
    batch: Annotated[int, typer.Option(min=1, help="Requests of a step.")] = 64,
    repetitions: Annotated[int, typer.Option(min=20, help="Timed steps.")] = 2_000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Report what verification asks of the host."""
    found = in_fresh_process(measure, batch, repetitions)
    table = Table("step", "launches", "allocations", "other operations", "µs", title=f"{batch} requests")
    for row in found:
        counts = len(row["launches"]), row["allocations"], len(row["others"])
        table.add_row(row["step"], *map(str, counts), f"{row['host_us']:.0f}")
    Console().print(table)
    if json_path is not None:
        write_result(json_path, {"schema": 1, "batch": batch, "host": found})


if __name__ == "__main__":
    run(main)
