"""What a compiled kernel consists of, read from its assembly: instructions, loops, loads by width, barriers.

NVIDIA's is disassembled from the binary (SASS), AMD's is what the compiler has printed (AMDGCN).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

_SASS = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+([^;/]+);")
_SASS_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_SASS_LOAD = re.compile(r"\bLDG\.E(?P<options>[.\w]*)")
_AMD_LABEL = re.compile(r"^\.?(L?BB\d+_\d+):")
_AMD_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat)_\w+)")
_AMD_LOAD = re.compile(r"^(?:global|buffer|flat)_load_(\w+)")
_AMD_WIDTHS = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32}


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel; every number is of what stands in the program, not of what runs."""

    instructions: int
    loops: list[int] = field(default_factory=list)  # instructions of every loop that has no loop within it
    loads: dict[int, int] = field(default_factory=dict)  # width in bits -> loads from global memory
    barriers: int = 0

    def executed(self, trips: int) -> int:
        """Return the instructions of a run that takes every branch once and every innermost loop ``trips`` times."""
        return self.instructions + (trips - 1) * sum(self.loops)


def cuobjdump(option: str, cubin: bytes) -> str:
    """Return what NVIDIA's tool, which comes with Triton, says of a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def parse_sass(text: str) -> MachineCode:
    """Read a listing of cuobjdump. Padding behind the program does not count, nor its endless loop."""
    lines = [(int(address, 16), instruction.strip()) for address, instruction in _SASS.findall(text)]
    lines = [(address, instruction) for address, instruction in lines if not instruction.startswith("NOP")]
    spans = []
    for address, instruction in lines:
        branch = _SASS_BRANCH.search(instruction)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    loads: Counter[int] = Counter()
    for _, instruction in lines:
        load = _SASS_LOAD.search(instruction)
        if load:
            loads[_sass_width(load["options"])] += 1
    return MachineCode(
        len(lines),
        _innermost(spans, [address for address, _ in lines]),
        dict(loads),
        sum("BAR.SYNC" in instruction for _, instruction in lines),
    )


def _sass_width(options: str) -> int:
    """Return the bits that a load with these options takes; 32 where none is named."""
    named = re.search(r"\.[US]?(8|16|64|128|256)\b", options)
    return int(named[1]) if named else 32


def parse_amdgcn(text: str) -> MachineCode:
    """Read the assembly that LLVM prints for AMD."""
    labels: dict[str, int] = {}
    names: list[str] = []
    spans = []
    for line in text.splitlines():
        label = _AMD_LABEL.match(line)
        if label:
            labels[label[1]] = len(names)
        instruction = _AMD_INSTRUCTION.match(line)
        if instruction:
            branch = re.search(r"s_c?branch\w*\s+\.?(L?BB\d+_\d+)", line)
            if branch and branch[1] in labels:
                spans.append((labels[branch[1]], len(names)))
            names.append(instruction[1])
    loads: Counter[int] = Counter()
    for name in names:
        load = _AMD_LOAD.match(name)
        if load:
            loads[_AMD_WIDTHS.get(load[1], 8 if "byte" in load[1] or load[1].endswith("8") else 16)] += 1
    return MachineCode(
        len(names), _innermost(spans, list(range(len(names)))), dict(loads), sum("s_barrier" in n for n in names)
    )


def _innermost(spans: list[tuple[int, int]], places: list[int]) -> list[int]:
    """Return how many instructions each loop has that holds no other; loops are (first, last) in ``places``."""
    inner = [
        (first, last)
        for first, last in set(spans)
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]
    return [sum(first <= place <= last for place in places) for first, last in sorted(inner)]
