"""Compile Triton kernels for GPUs that are not there, and read what the compilers say of the result.

A launch is recorded instead of run: the arguments of the real entry functions decide the signature, as in Triton's
own just-in-time compiler, so what is reported is what a server compiles.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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

_LOAD_BITS = {
    "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8,
    "dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short_d16": 16,
    "short_d16_hi": 16, "ubyte": 8, "sbyte": 8,
}  # fmt: skip
"""Width of a load by the last part of its name, NVIDIA's and AMD's."""


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
    instructions: int  # of the program as it stands in memory
    loop_instructions: int  # of those, in loops over parts of a block; they run once for every part
    barriers: int
    loads: dict[int, int]  # global loads by their width in bits, as they stand in memory


@contextlib.contextmanager
def recorded_launches(*modules: Any) -> Iterator[list[Launch]]:
    """Record, instead of running, every launch of a kernel found in these modules."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, num_warps: int = 4, maxnreg: int | None = None, **kwargs: Any) -> None:
                arguments = {**dict(zip(self.kernel.arg_names[: len(args)], args, strict=True)), **kwargs}
                launches.append(Launch(self.kernel, grid, arguments, num_warps, maxnreg))

            return launch

    replaced = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    for module, name, value in replaced:
        setattr(module, name, Recorder(value))
    try:
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "-sass"))
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # /*0a30*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", code)
    at = [int(address, 16) for address, _, _ in lines]
    # nothing runs behind the last branch, which is to itself; what follows is padding
    end = max(
        (i for i, (_, name, to) in enumerate(lines) if name == "BRA" and _target(to) == at[i]), default=len(lines)
    )
    jumps = [(at[i], _target(to)) for i, (_, name, to) in enumerate(lines[:end]) if name.startswith("BRA")]
    widths = [_LOAD_BITS.get(name.rpartition(".")[2], 32) for _, name, _ in lines[:end] if name.startswith("LDG")]
    return Resources(
        used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared,
        instructions=end,
        loop_instructions=_inside(at[:end], [(to, here) for here, to in jumps if to is not None and to < here]),
        barriers=sum(name.startswith("BAR") for _, name, _ in lines[:end]),
        loads=dict(sorted(Counter(widths).items())),
    )  # fmt: skip


def _cuobjdump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


def _target(operands: str) -> int | None:
    """Return where a branch goes."""
    found = re.search(r"0x([0-9a-f]+)", operands)
    return int(found[1], 16) if found else None


def _inside(places: list[int], loops: list[tuple[int, int]]) -> int:
    """Return how many of these places lie in one of these loops."""
    return sum(any(first <= place <= last for first, last in loops) for place in places)


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    lines = re.findall(r"^(?:\t([a-z]\w*)([^\n]*)|(\.LBB\w+):)", text.partition("s_endpgm")[0], re.MULTILINE)
    label_at = {label: i for i, (_, _, label) in enumerate(lines) if label}
    jumps = [
        (i, label_at.get(operands.strip(), i)) for i, (name, operands, _) in enumerate(lines) if "branch" in name
    ]  # fmt: skip
    code = [i for i, (name, _, _) in enumerate(lines) if name]
    widths = [
        _LOAD_BITS.get(m[1], 32) for name, _, _ in lines if (m := re.match(r"(?:global|buffer)_load_(\w+)", name))
    ]
    return Resources(
        field("vgpr_count"), max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size")),
        compiled.metadata.shared,
        instructions=len(code),
        loop_instructions=_inside(code, [(to, here) for here, to in jumps if to < here]),
        barriers=sum(name == "s_barrier" for name, _, _ in lines),
        loads=dict(sorted(Counter(widths).items())),
    )  # fmt: skip
