"""Compile Triton kernels for GPUs that are not there, and read what the compilers say of the result.

A launch is recorded instead of run: the arguments of the real entry functions decide the signature, as in Triton's
own just-in-time compiler, so what is reported is what a server compiles.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import machine_code
from benchmarks.machine_code import MachineCode

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch that was asked for."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    maxnreg: int | None = None  # for NVIDIA

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__


@dataclass(frozen=True)
class Resources:
    """What one program needs."""

    registers: int  # per thread: vector registers on AMD
    spill_bytes: int  # per thread, in memory; AMD's scalar registers overflow into vector registers, which is no spill
    shared_bytes: int
    code: MachineCode


@contextlib.contextmanager
def replaced_kernels(stand_in: Callable[[Any], Any], *modules: Any) -> Iterator[None]:
    """Put ``stand_in(kernel)`` in the place of every kernel found in these modules."""
    replaced = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    for module, name, value in replaced:
        setattr(module, name, stand_in(value))
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


@contextlib.contextmanager
def recorded_launches(*modules: Any) -> Iterator[list[Launch]]:
    """Record, instead of running, every launch of a kernel found in these modules."""
    launches: list[Launch] = []

    class LaunchRecorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, num_warps: int = 4, maxnreg: int | None = None, **kwargs: Any) -> None:
                arguments = {**dict(zip(self.kernel.arg_names[: len(args)], args, strict=True)), **kwargs}
                launches.append(Launch(self.kernel, grid, arguments, num_warps, maxnreg))

            return launch

    with replaced_kernels(LaunchRecorder, *modules):
        yield launches


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a recorded launch for one of ``TARGETS``; tensors are taken to be 16-byte aligned, as allocators do."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in launch.kernel.params:
        value, index = launch.arguments[parameter.name], (parameter.num,)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[index] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            aligned = not parameter.do_not_specialize_on_alignment
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[index] = "constexpr", 1
                continue
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned and not parameter.do_not_specialize:
            attributes[index] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    nvidia = target.startswith("sm_")
    options = {"num_warps": launch.num_warps} | ({"maxnreg": launch.maxnreg} if nvidia and launch.maxnreg else {})
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return (_nvidia if nvidia else _amd)(compiled)


def _nvidia(compiled: Any) -> Resources:
    usage = machine_code.cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    code = machine_code.parse_sass(machine_code.cuobjdump("-sass", compiled.asm["cubin"]))
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, code)


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    spilled = max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size"))
    return Resources(field("vgpr_count"), spilled, compiled.metadata.shared, machine_code.parse_amdgcn(text))
