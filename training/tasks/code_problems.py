"""The task of writing Python functions, as in HumanEval and MBPP: an answer is right when its tests pass.

A record is {prompt, test, entry_point} with ``check(candidate)`` in the test (HumanEval), {text or prompt, test_list}
with one assertion in each entry (MBPP), or {prompt, tests, entry_point} with a program. The tests run in the sandbox of
:mod:`sandbox`, in a process of their own.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from vllm_cospec.errors import ConfigError, shorten
from vllm_cospec.training.tasks.datasets import Records
from vllm_cospec.training.tasks.hub import records_of
from vllm_cospec.training.tasks.protocol import Options, Problem, task
from vllm_cospec.training.tasks.records import BadLines, BadRecordError, collect, require_object
from vllm_cospec.training.tasks.sandbox import Limits, require, run

CHECKED = 32  # solutions that come with the problems are tried on their tests
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_THOUGHT = "</think>"


class CodeOptions(Options):
    """Of the task code."""

    path: str
    """JSONL file (plain or .gz), or what the task dataset takes."""
    test_path: str | None = None
    """File with the test problems; left out: ``test_split``, else an eighth of ``path``."""
    name: str | None = None
    """Configuration of a data set."""
    split: str = "train"
    """Split of a data set that training and calibration problems come from."""
    test_split: str | None = None
    """Split of a data set with the test problems."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""
    template: str = Field("{prompt}", pattern=r"\{prompt\}")
    """What is asked: {prompt}, {tests} and {entry_point} are put in."""
    bad_lines: BadLines = "refuse"
    """What becomes of a record that is no problem: refuse ends with its place, leave_out counts it and goes on."""
    timeout_s: float = Field(5.0, gt=0)
    """Seconds the tests of one answer may take."""
    memory_gb: float = Field(1.0, gt=0)
    """GiB of address space their process may use."""
    sandbox: Literal["confined", "limits"] = "confined"
    """confined: no network, no other process, no file outside of a directory of its own. limits: limits of time,
    memory and file size alone, where the kernel knows neither Landlock nor seccomp; run such answers in a container."""


@task("code", CodeOptions)
class CodeTask(Records):
    """Functions to write."""

    def __init__(self, options: CodeOptions):
        self.timeout_s = options.timeout_s
        confined = options.sandbox == "confined"
        self._limits = Limits(options.timeout_s, options.memory_gb, confined=confined)
        require(confined)
        read = partial(read_code, template=options.template)
        places = [(options.path, options.split)]
        if options.test_path or options.test_split:
            places.append((options.test_path or options.path, options.test_split or options.split))
        found = [
            collect(records_of(path, options.name, split, options.revision), path, options.bad_lines, read)
            for path, split in places
        ]
        self.left_out = sum(count for _, count in found)
        tests = found[1][0] if len(found) > 1 else None
        super().__init__(f"task.options.path: {options.path}", "{prompt}", found[0][0], tests)

    def score(self, problem: Problem, text: str) -> float:  # type: ignore[override]
        """Return 1.0 when the tests of the problem pass with the code of a response."""
        return float(run(program_of(problem, text), self._limits).passed)

    def check(self, problems: Sequence[Problem]) -> None:  # type: ignore[override]
        """Try solutions that came with the problems on their tests, some of them spread over all.

        Raises:
            ConfigError: one fails; names its place.
        """
        solved = [problem for problem in problems if problem.answer]
        for problem in solved[:: max(1, len(solved) // CHECKED)]:
            outcome = run(program_of(problem, problem.answer), self._limits)
            if not outcome.passed:
                raise ConfigError(
                    f"{problem.source}: the solution does not pass its tests ({outcome.reason}); correct it, raise "
                    f"task.options.timeout_s, or leave the line out"
                )


def read_code(record: Any, source: str, template: str = "{prompt}") -> Problem:
    """Turn a record into a problem: its answer is the solution that comes with it, or empty.

    Args:
        record: a JSON object.
        source: where it stands.
        template: of what is asked.

    Raises:
        BadRecordError: it is none.
    """
    record = require_object(record)
    prompt, solution = record.get("prompt") or record.get("text"), record.get("canonical_solution")
    entry_point = record.get("entry_point")
    shown = ""
    if record.get("test_list"):
        shown = "\n".join(record["test_list"])
        setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or ())
        tests, stub = f"{setup}\n{shown}", ""
        solution = record.get("code")
        entry_point = entry_point or _tested(shown, str(solution or ""))
    elif record.get("test") and entry_point:
        tests, stub = f"{record['test']}\ncheck({entry_point})", prompt or ""
        solution = None if solution is None else f"{prompt}{solution}"
    elif record.get("tests") and entry_point:
        tests = shown = record["tests"]
        stub = ""
    else:
        raise BadRecordError(
            "needs test and entry_point (HumanEval), test_list (MBPP), or tests and entry_point; the fields here are "
            f"{', '.join(map(repr, record)) or 'none'}"
        )
    for name, value in (("prompt", prompt), ("entry_point", entry_point), ("the tests", tests)):
        if not isinstance(value, str) or not value.strip():
            raise BadRecordError(f"{name!r} must be a text that is not empty, is {shorten(value)}")
    asked = str(prompt)
    for name, value in (("{tests}", shown), ("{entry_point}", str(entry_point)), ("{prompt}", asked)):
        template = template.replace(name, value)
    return Problem(
        template, str(solution or ""), {"tests": tests, "entry_point": str(entry_point), "stub": stub}, source
    )


def program_of(problem: Problem, text: str) -> str:
    """Return the program that decides about a response: what was given, the response's code, the tests."""
    given = problem.metadata
    code = code_of(text, given["entry_point"])
    if _defines(code, given["entry_point"]):
        stub = given["stub"] if _compiles(given["stub"]) else ""
        return f"{stub}\n\n{code}\n\n{given['tests']}\n"
    return f"{given['stub']}{_continuation(code)}\n\n{given['tests']}\n"


def code_of(text: str, entry_point: str) -> str:
    """Return the code of a response: its last fenced block that defines the function, else its last, else all of it."""
    text = text.rpartition(_THOUGHT)[2]
    blocks = _FENCED.findall(text)
    return next((block for block in reversed(blocks) if _defines(block, entry_point)), blocks[-1] if blocks else text)


def _defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^(?:async )?(?:def|class) {re.escape(name)}\b|^{re.escape(name)} *=", code, re.MULTILINE)
        is not None
    )


def _compiles(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _continuation(code: str) -> str:
    """The body with which a response goes on from a stub: up to the first line that stands at the margin again."""
    lines = code.split("\n")
    end = next((i for i, line in enumerate(lines) if i and line[:1].strip() and line[:1] not in ")]}"), len(lines))
    return "\n".join(lines[:end])


def _tested(tests: str, solution: str) -> str:
    """The function that assertions call: one that the solution defines, else the first that Python does not know."""
    try:
        called = [
            node.func.id for node in ast.walk(ast.parse(tests))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]  # fmt: skip
    except (SyntaxError, ValueError):
        return ""
    own = [name for name in called if _defines(solution, name)]
    return next(iter(own or [name for name in called if not hasattr(builtins, name)]), "")
