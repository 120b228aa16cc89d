"""Files and functions stay short enough to be read at once, and a class is named like no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE, FUNCTION, KERNEL = 400, 80, 120  # lines
FOLDERS = ("kernels", "vllm_cospec", "training", "benchmarks", "tests")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def functions(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield name, lines and whether it is a kernel, of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1, kernel


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_and_no_function_is_too_long(folder: str) -> None:
    files = [path for path in sources() if path.relative_to(ROOT).parts[0] == folder]
    assert files
    assert [str(path) for path in files if len(path.read_text().splitlines()) > FILE] == []
    long = [
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name, lines, kernel in functions(path)
        if lines > (KERNEL if kernel else FUNCTION)
    ]
    assert long == []


def test_a_long_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("@triton.jit(x=1)\ndef a():\n" + "    b\n" * 120 + "async def c(): pass\n")
    assert list(functions(tmp_path / "a.py")) == [("a", 121, True), ("c", 1, False)]


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in (path for path in sources() if path.relative_to(ROOT).parts[0] != "tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
