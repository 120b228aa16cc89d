"""The task made of a user's own problems: JSONL files, GSM8K format among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks.answers import fault
from vllm_cospec.training.tasks.protocol import Options, Problem, task
from vllm_cospec.training.tasks.records import AnswerFormat, BadLines, collect, read_lines, read_problem
from vllm_cospec.training.tasks.rewards import math_verify
from vllm_cospec.training.tasks.splits import GIVEN, Split, split_of


class RecordOptions(Options):
    """Of every task that is made of records."""

    prompt_key: str | None = None
    """Field with the prompt; left out: prompt, else question."""
    answer_key: str | None = None
    """Field with the answer; left out: answer. All other fields go to the grader as ``problem.metadata``."""
    answer_format: AnswerFormat = "auto"
    """How the result stands in the answer: plain (alone), gsm8k (behind ####), boxed (in the last \\boxed{}). auto
    takes what it finds, and wants #### where the prompt's field is called question, as in GSM8K."""
    bad_lines: BadLines = "refuse"
    """What becomes of a line that is no problem: refuse ends with its number, leave_out counts it and goes on."""
    template: str = Field("{prompt}", pattern=r"\{prompt\}")
    """The prompt as it is sent."""


class JsonlOptions(RecordOptions):
    """Of the task jsonl."""

    path: str
    """File with a JSON object per line: {"prompt", "answer"}, or {"question", "answer"} as in GSM8K, where the answer
    stands after ####. UTF-8, plain or .gz."""
    test_path: str | None = None
    """File with the test problems; left out: an eighth of ``path``, chosen by a hash of the prompt."""


class Records:
    """Problems that are all there from the beginning. A hash of the prompt decides which split one is in."""

    def __init__(self, where: str, template: str, everything: list[Problem], tests: list[Problem] | None):
        """Divide the problems.

        Args:
            where: what they come from, for messages.
            template: of the prompt.
            everything: all problems, but for tests of their own.
            tests: the test split; None for an eighth of everything.
        """
        self._where = where
        known = {problem.prompt for problem in tests or ()}
        self._splits: dict[Split, list[Problem]] = {
            split: [p for p in everything if split_of(p.prompt) in sources and p.prompt not in known]
            for split, sources in GIVEN.items()
        }
        if tests is not None:
            self._splits["train"] += [p for p in self._splits["test"] if p.prompt not in known]
            self._splits["test"] = tests
        for split, own in self._splits.items():
            self._splits[split] = [
                Problem(template.replace("{prompt}", p.prompt), p.answer, p.metadata, p.source) for p in own
            ]

    def everything(self, split: Split) -> list[Problem]:
        """Return all problems of a split."""
        return list(self._splits[split])

    def problems(self, seed: int, n: int, split: Split = "test") -> list[Problem]:
        """See :meth:`Task.problems`.

        Raises:
            ConfigError: the split has fewer than ``n``.
        """
        found = self._splits[split]
        if n > len(found):
            raise ConfigError(f"{self._where} has {len(found)} problems for {split}, {n} were asked for")
        return random.Random(f"{split}/{seed}").sample(found, n)

    @staticmethod
    def score(problem: Problem, text: str) -> float:
        """By math-verify."""
        return math_verify(problem, text)

    @staticmethod
    def check(problems: Sequence[Problem]) -> None:
        """Check the gold answers by the task's own scorer.

        Raises:
            ConfigError: one cannot be graded; names its place.
        """
        check_golds(problems)


def check_golds(problems: Sequence[Problem]) -> None:
    """Check that every gold answer scores 1 against itself with math-verify.

    Raises:
        ConfigError: one does not; names its place and the way out.
    """
    for problem in problems:
        reason = fault(problem.answer)
        if reason:
            raise ConfigError(
                f"{problem.source or repr(problem.prompt[:60])}: the answer {reason}; correct it, or set task.reward = "
                f'"exact"'
            )


@task("jsonl", JsonlOptions)
class JsonlTask(Records):
    """Problems from files."""

    def __init__(self, options: JsonlOptions):
        read = partial(
            read_problem, prompt_key=options.prompt_key, answer_key=options.answer_key,
            answer_format=options.answer_format,
        )  # fmt: skip
        paths = [options.path] + ([options.test_path] if options.test_path else [])
        found = [collect(read_lines(Path(path)), path, options.bad_lines, read) for path in paths]
        self.left_out = sum(count for _, count in found)
        tests = found[1][0] if len(found) > 1 else None
        super().__init__(f"task.options.path: {options.path}", options.template, found[0][0], tests)
