"""Function bodies: which are asked for, where an answer ends, and what parses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts import benchmark
from transformers import GenerationConfig

from vllm_cospec.training.config import PairConfig
from vllm_cospec.training.tasks.code_corpus import Source

bodies = benchmark("bodies")

FILE = '''import os

LIMIT = 3


class Shop:
    @property
    def total(self) -> int:
        """What all of it costs."""
        found = 0
        for item in self.items:
            found += item.price

        return min(found, LIMIT)

    def short(self) -> int:
        return 1

    def noted(self, a: int) -> int:  # what a comment says stands behind the colon
        a += 1
        a += 2
        a += 3
        a += 4
        return a


def listed(
    names: list[str],
) -> list[str]:
    kept = []
    for name in names:
        if name:
            kept.append(name)
    return kept
'''


def functions() -> list[Any]:
    return sorted(bodies.functions_of(Source("shop.py", FILE, "test")), key=lambda function: function.line)


def test_functions_with_a_plain_header_and_a_body_of_some_lines_are_asked_for() -> None:
    total, listed = functions()
    assert (total.line, total.indent, listed.line, listed.indent) == (8, 4, 27, 0)
    assert total.prompt == FILE[: FILE.index("        found = 0") - 1]
    assert total.header == '    def total(self) -> int:\n        """What all of it costs."""'
    assert total.body.startswith("        found = 0\n")
    assert total.body.endswith("return min(found, LIMIT)")
    assert listed.header == "def listed(\n    names: list[str],\n) -> list[str]:"
    assert all(bodies.parses(function, "\n" + function.body) for function in (total, listed))


def test_a_body_ends_where_the_next_thing_of_its_depth_begins() -> None:
    total, listed = functions()
    text = "\n" + total.body
    assert bodies.body_of(total, f"{text}\n\n    @property\n    def next(self):\n        pass", True) == (
        text + "\n",
        True,
    )
    assert bodies.body_of(total, text, False) == (text, True)
    cut = "\n        found = 0\n        for item in self.it"
    assert bodies.body_of(total, cut, True) == ("\n        found = 0", False)
    assert bodies.body_of(total, "\n        found = 0\n    ", True) == (
        "\n        found = 0",
        False,
    )  # may go on deeper
    assert bodies.body_of(listed, "\n    pass\nNEXT = 1\n", False) == ("\n    pass", True)


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("\n        return self", True),
        ("\n        for item in self.items:", True),  # a beginning
        ("\n        call(1,\n             2,", True),
        ("\n        return self self", False),
        ("\n        x = )", False),
        ("\n      x = 1\n          y = 2", False),
        (" \n", False),  # nothing was written
    ],
)
def test_what_parses_is_python_or_the_beginning_of_some(body: str, right: bool) -> None:
    assert bodies.parses(functions()[0], body) is right


def test_only_the_tokens_of_a_body_are_judged() -> None:
    total, _ = functions()
    tokenizer = SimpleNamespace(decode="".join)
    tokens = ["\n    ", "    return", " 1", "\n\n", "    def next"]
    response = SimpleNamespace(text="".join(tokens), tokens=tokens, capped=True)
    body = bodies.judge(total, response, tokenizer)
    assert body.text == "\n        return 1\n"
    assert body.tokens == ["\n    ", "    return", " 1", "\n\n"]
    assert body.parses
    assert not body.capped


def test_two_modes_are_compared_function_by_function() -> None:
    def row(entries: list[tuple[bool, float]]) -> dict[str, Any]:
        return {"each": [{"parses": right, "log_likelihood": nats} for right, nats in entries]}

    found = bodies.against(
        row([(True, -1.0), (True, -2.0), (False, -1.0)]), row([(True, -0.5), (False, -2.5), (True, -0.5)])
    )
    assert (found["gained"], found["lost"]) == (1, 1)
    assert found["log_likelihood"] == pytest.approx(-0.5 / 3)


def test_an_engine_for_bodies_reads_a_generation_configuration_without_line_breaks(tmp_path: Path) -> None:
    own = {"dtype": "bfloat16", "max_model_len": 384}
    pair = PairConfig(target="a/target", draft="a/draft", num_speculative_tokens=5, engine=own)
    engine = bodies.beyond_lines(pair, tmp_path).engine
    assert engine == {"dtype": "bfloat16", "max_model_len": 320 + 256, "generation_config": str(tmp_path)}
    assert GenerationConfig.from_pretrained(engine["generation_config"]).eos_token_id == [0]
    assert pair.engine["max_model_len"] == 384
