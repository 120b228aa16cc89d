"""The commands that README and documentation show are commands that exist, with options that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from scripts import ROOT, benchmark

from vllm_cospec import cli

DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in ("docs", "benchmarks", "training", "vllm_cospec")
             for path in (ROOT / folder).rglob("*.md"))]  # fmt: skip
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
PLACEHOLDER = re.compile(r"(?<![\w-])[A-Z]+(?![\w=])")  # DIR, T, ORG/NAME, but not PORT=8000
USAGE_ERROR: Any = typer.BadParameter.__base__  # of click, which some versions of typer bring along themselves


def commands(text: str) -> list[list[str]]:
    """Return what a text shows as a command of this project, split as a shell does.

    In a sentence a command without options is a mention, which need not be whole.
    """
    fenced = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    found = []
    for line in fenced + [code for code in inline if " -" in code or code.startswith("make ")]:
        if re.match(r"(\.venv/bin/)?(cospec|python|make) ", line.strip()) and not PLACEHOLDER.search(line):
            words = shlex.split(line, comments=True)
            found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def is_module(name: str) -> bool:
    """Whether something can be run as ``python -m NAME`` from the checkout."""
    if name.startswith("benchmarks"):
        return any((ROOT / f"{name.replace('.', '/')}{end}").is_file() for end in (".py", "/__main__.py"))
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def problem(words: list[str]) -> str | None:
    """Return what is wrong with a command, None if nothing is."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
        return next((f"no target {word}" for word in rest if "=" not in word and word not in targets), None)
    parser: Any
    if program == "cospec":
        name, *rest = rest
        parser = typer.main.get_command(cli.app).commands.get(name)  # type: ignore[attr-defined]
        if parser is None:
            return f"no command {name}"
    elif Path(rest[0]).parent == Path("benchmarks") and (ROOT / rest[0]).is_file():
        module = benchmark(Path(rest.pop(0)).stem)
        app = getattr(module, "app", None) or benchmark("command").application(module.main)
        parser = typer.main.get_command(app)
    elif rest[0] == "-m":
        return None if is_module(rest[1]) else f"no module {rest[1]}"
    else:
        return None if (ROOT / rest[0]).is_file() else f"no file {rest[0]}"
    try:
        parser.make_context(program, rest)
    except USAGE_ERROR as error:
        return error.format_message()
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documentation_exist(path: Path) -> None:
    wrong = {shlex.join(words): problem(words) for words in commands(path.read_text())}
    assert {command: what for command, what in wrong.items() if what} == {}


def test_a_command_that_does_not_exist_is_found() -> None:
    text = """`cospec train` `cospec inspect DIR` `python benchmarks/pareto.py --coarse` `python -m benchmarks.tea -h`
```
make tea # hot
cospec sing
```
`cospec evaluate --mode strict --seed
ten`"""
    found = commands(text)
    assert found == [
        ["make", "tea"], ["cospec", "sing"], ["python", "benchmarks/pareto.py", "--coarse"],
        ["python", "-m", "benchmarks.tea", "-h"],
        ["cospec", "evaluate", "--mode", "strict", "--seed", "ten"],
    ]  # fmt: skip
    tea, sing, pareto, module, evaluate = map(problem, found)
    assert tea == "no target tea"
    assert sing == "no command sing"
    assert module == "no module benchmarks.tea"
    assert pareto is not None
    assert "--artefact" in pareto
    assert evaluate is not None
    assert "Invalid value for '--seed'" in evaluate
