"""The task of the SmolLM2 pair: a product and two sums, worked step by step after the pattern of solved examples."""

from __future__ import annotations

import itertools
import random
import re
from functools import cache
from typing import NamedTuple

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks.protocol import Options, Problem, task
from vllm_cospec.training.tasks.splits import Split, split_of

FIRST_FACTORS, SECOND_FACTORS, ADDENDS = range(2, 13), range(2, 10), range(2, 10)
_ANSWER = re.compile(r"so [^=]* = (\d+)\s*$")


class Exercise(NamedTuple):
    """``first * second + addend + last``."""

    first: int
    second: int
    addend: int
    last: int

    @property
    def question(self) -> str:
        """As it is asked: ``6 * 7 + 8 + 5``."""
        return f"{self.first} * {self.second} + {self.addend} + {self.last}"

    def solution(self, product: int | None = None) -> str:
        """The derivation: ``6 * 7 = 42; 42 + 8 = 50; 50 + 5 = 55; so 6 * 7 + 8 + 5 = 55``.

        Args:
            product: what is written as the product, right or wrong; None for the right one.
        """
        product = self.first * self.second if product is None else product
        middle = product + self.addend
        total = middle + self.last
        return (
            f"{self.first} * {self.second} = {product}; {product} + {self.addend} = {middle}; "
            f"{middle} + {self.last} = {total}; so {self.question} = {total}"
        )

    def worked(self, product: int | None = None) -> str:
        """Question and derivation as they stand in a prompt and in training text."""
        return f"Problem: {self.question}\nSolution: {self.solution(product)}\n"


EXAMPLES = (Exercise(4, 7, 5, 8), Exercise(12, 2, 9, 3), Exercise(8, 3, 6, 6))


def chat_template() -> str:
    """The Jinja template that frames a question as the last of a row of solved ones."""
    before = "\n".join(example.worked() for example in EXAMPLES) + "\nProblem: "
    return "{{ '" + before.replace("\n", "\\n") + "' + messages[-1]['content'] + '\\nSolution:' }}"


@cache
def exercises(split: Split) -> tuple[Exercise, ...]:
    """All of a split: a hash of the question decides where one belongs. The examples belong nowhere."""
    everything = map(Exercise._make, itertools.product(FIRST_FACTORS, SECOND_FACTORS, ADDENDS, ADDENDS))
    return tuple(e for e in everything if e not in EXAMPLES and split_of(e.question) == split)


@task("product_and_sums")
class ProductAndSums:
    """5,629 problems in all, an eighth of them for testing."""

    def __init__(self, options: Options | None = None):
        """It has no options."""

    def problems(self, seed: int, n: int, split: Split = "test") -> list[Problem]:
        """See :meth:`Task.problems`.

        Raises:
            ConfigError: the split has fewer than ``n``.
        """
        found = exercises(split)
        if n > len(found):
            raise ConfigError(f"task: product_and_sums has {len(found)} problems for {split}, {n} were asked for")
        chosen = random.Random(f"product_and_sums/{split}/{seed}").sample(found, n)
        return [Problem(e.question, str(e.first * e.second + e.addend + e.last)) for e in chosen]

    def score(self, problem: Problem, text: str) -> float:
        """1.0 when the conclusion ``so ... = N`` gives the problem's answer."""
        found = _ANSWER.search(text)
        return float(found is not None and found.group(1) == problem.answer)
