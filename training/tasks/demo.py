"""The bundled task: multi-step arithmetic whose answer anyone can check with a calculator."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_cospec.training.tasks.protocol import Options, Problem, task
from vllm_cospec.training.tasks.splits import Split, split_of

_ANSWER = re.compile(r"#(-?\d+)\s*$")


@dataclass(frozen=True)
class Expression:
    """Signed terms, each a number or a product of a two-digit number and one up to 19."""

    terms: tuple[tuple[str, tuple[int, ...]], ...]  # (sign, factors); the first sign is "+"

    @property
    def prompt(self) -> str:
        """The expression as a user would type it, with the question mark: ``385+47*6-129?``."""
        text = "".join(sign + "*".join(map(str, factors)) for sign, factors in self.terms)
        return text.removeprefix("+") + "?"

    @property
    def solution(self) -> str:
        """The written-out steps and the value: ``47*6=282;385+282=667;667-129=538#538``."""
        steps, values = [], []
        for sign, factors in self.terms:
            if len(factors) == 2:
                steps.append(f"{factors[0]}*{factors[1]}={factors[0] * factors[1]}")
            values.append((sign, factors[0] * (factors[1] if len(factors) == 2 else 1)))
        total = values[0][1]
        for sign, value in values[1:]:
            result = total + value if sign == "+" else total - value
            steps.append(f"{total}{sign}{value}={result}")
            total = result
        return ";".join(steps) + f"#{total}"

    @property
    def never_negative(self) -> bool:
        """Whether every running total is at least 0, so that no step needs a minus sign of its own."""
        total = 0
        for sign, factors in self.terms:
            value = factors[0] * (factors[1] if len(factors) == 2 else 1)
            total = total + value if sign == "+" else total - value
            if total < 0:
                return False
        return True


def draw_expression(
    rng: random.Random, num_terms: int, product_share: float, sum_share: float = 0.5, large_share: float = 0.0
) -> Expression:
    """Draw an expression of ``num_terms`` terms.

    Args:
        rng: source of randomness.
        num_terms: at least 1; a single term is always a product (a bare number would be no problem).
        product_share: probability that a term is a product.
        sum_share: probability that a term after the first is added rather than subtracted.
        large_share: probability that a product's second factor has two digits (11 to 19) instead of one.
    """
    while True:
        terms = []
        for index in range(num_terms):
            sign = "+" if index == 0 or rng.random() < sum_share else "-"
            if num_terms == 1 or rng.random() < product_share:
                large = large_share > 0 and rng.random() < large_share
                factors: tuple[int, ...] = (rng.randint(11, 99), rng.randint(11, 19) if large else rng.randint(2, 9))
            else:
                factors = (rng.randint(20, 499),)
            terms.append((sign, factors))
        expression = Expression(tuple(terms))
        if expression.never_negative:
            return expression


@task("demo")
class DemoTask:
    """Three-term arithmetic that mixes products with sums and differences in one problem."""

    def __init__(self, options: Options | None = None):
        """It has no options."""

    def expressions(self, seed: int, split: Split) -> Iterator[Expression]:
        """Yield an endless, seeded stream of distinct expressions of ``split`` with at least one product each."""
        rng = random.Random(f"demo/{split}/{seed}")
        seen: set[str] = set()
        while True:
            expression = draw_expression(rng, num_terms=3, product_share=0.25)
            num_products = sum(len(factors) == 2 for _, factors in expression.terms)
            if not 1 <= num_products <= 2:
                continue
            prompt = expression.prompt
            if prompt in seen or split_of(prompt) != split:
                continue
            seen.add(prompt)
            yield expression

    def problems(self, seed: int, n: int, split: Split = "test") -> list[Problem]:
        """See :meth:`Task.problems`."""
        stream = self.expressions(seed, split)
        return [Problem(e.prompt, e.solution.rpartition("#")[2]) for e, _ in zip(stream, range(n), strict=False)]

    def score(self, problem: Problem, text: str) -> float:
        """1.0 when the number after the last ``#`` equals the problem's answer."""
        found = _ANSWER.search(text.strip())
        return float(found is not None and found.group(1) == problem.answer)
