"""The task made of a user's own problems: JSONL files, GSM8K format among them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pydantic import Field

from vllm_cospec.errors import ConfigError, shorten
from vllm_cospec.training.tasks.protocol import Options, Problem, task
from vllm_cospec.training.tasks.rewards import math_verify
from vllm_cospec.training.tasks.splits import GIVEN, Split, split_of


class JsonlOptions(Options):
    """Of the task jsonl."""

    path: str
    """File with a JSON object per line: {"prompt", "answer"}, or {"question", "answer"} as in GSM8K, where the answer
    stands after ####."""
    test_path: str | None = None
    """File with the test problems; left out: an eighth of ``path``, chosen by a hash of the prompt."""
    template: str = Field("{prompt}", pattern=r"\{prompt\}")
    """The prompt as it is sent."""


@task("jsonl", JsonlOptions)
class JsonlTask:
    """Problems from files. A hash of the prompt decides which split a problem is in."""

    def __init__(self, options: JsonlOptions):
        everything = read_problems(Path(options.path))
        tests = read_problems(Path(options.test_path)) if options.test_path else None
        self._template = options.template
        self._path = options.path
        known = {problem.prompt for problem in tests or ()}
        self._splits: dict[Split, list[Problem]] = {
            split: [p for p in everything if split_of(p.prompt) in sources and p.prompt not in known]
            for split, sources in GIVEN.items()
        }
        if tests is not None:
            self._splits["train"] += [p for p in self._splits["test"] if p.prompt not in known]
            self._splits["test"] = tests

    def problems(self, seed: int, n: int, split: Split = "test") -> list[Problem]:
        """See :meth:`Task.problems`.

        Raises:
            ConfigError: the split has fewer than ``n``.
        """
        found = self._splits[split]
        if n > len(found):
            raise ConfigError(
                f"task.options.path: {self._path} has {len(found)} problems for {split}, {n} were asked for"
            )
        chosen = random.Random(f"{split}/{seed}").sample(found, n)
        return [Problem(self._template.replace("{prompt}", p.prompt), p.answer) for p in chosen]

    def score(self, problem: Problem, text: str) -> float:
        """By math-verify."""
        return math_verify(problem, text)


def read_problems(path: Path) -> list[Problem]:
    """Read a JSONL file of problems; of equal prompts only the first is kept.

    Raises:
        ConfigError: names file, line number and what is wrong.
    """
    problems: dict[str, Problem] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    problem = _problem(line, f"{path}, line {number}")
                    problems.setdefault(problem.prompt, problem)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); pass a JSONL file") from None
    if not problems:
        raise ConfigError(f"{path}: holds no problem")
    return list(problems.values())


def _problem(line: str, where: str) -> Problem:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be a JSON object, is {shorten(entry)}")
    gsm8k = "question" in entry
    prompt, answer = entry.get("question" if gsm8k else "prompt"), entry.get("answer")
    for name, value in (("question" if gsm8k else "prompt", prompt), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: {name!r} must be a text that is not empty, is {shorten(value)}")
    assert prompt is not None
    assert answer is not None
    if gsm8k:
        _, mark, answer = answer.rpartition("####")
        if not mark:
            raise ConfigError(f"{where}: 'answer' has no '####' before the result, as GSM8K's have")
        answer = answer.replace(",", "")
    return Problem(prompt, answer.strip())
