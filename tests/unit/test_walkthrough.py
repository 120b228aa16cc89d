"""Completions token by token are those of verification, and the page shows those of the result file."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT, benchmark
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_cospec.demo
from vllm_cospec.arbiter import load_artefact
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.statistics import NUM_STATISTICS
from vllm_cospec.runners.trace import Decision
from vllm_cospec.training.rollout.engine import Response
from vllm_cospec.training.tasks import load_task

walkthrough = benchmark("walkthrough")
PAIR = Path(vllm_cospec.demo.__file__).parent


@pytest.fixture(scope="module")
def played() -> dict[float, list[Any]]:
    """A problem of the bundled pair, by threshold, and what the target says alone under -1."""
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    target, draft = (AutoModelForCausalLM.from_pretrained(PAIR / role).eval() for role in ("target", "draft"))
    (problem,) = load_task("demo").problems(3, 1, "test")
    ids = tokenizer(problem.prompt)["input_ids"]
    ends = {tokenizer.eos_token_id}
    arbiter, _ = load_artefact(PAIR / "arbiter")
    alone = target.generate(torch.tensor([ids]), max_new_tokens=walkthrough.MAX_TOKENS, do_sample=False)
    found = {limit: walkthrough.play((target, draft), arbiter, limit, ids, 7, ends) for limit in (1.0, 0.0)}
    return {-1: alone[0, len(ids) :].tolist(), **found}


def response(rows: list[Any]) -> Response:
    """What an engine that did the same would return."""
    sizes = [sum(row.step == step for row in rows) for step in range(rows[-1].step + 1)]
    nothing = torch.zeros(NUM_STATISTICS)
    decisions = [
        Decision("0", at, 0, nothing, row.emitted == row.draft, row.score)
        for at, row in enumerate(rows)
        if row.score is not None
    ]
    return Response([row.emitted for row in rows], "", sizes, False, decisions)


def test_where_nothing_is_kept_the_target_speaks_and_where_all_is_kept_blocks_are_whole(
    played: dict[float, list[Any]],
) -> None:
    assert [row.emitted for row in played[1.0]] == played[-1]
    assert all(row.emitted == row.target for row in played[1.0])
    kept = played[0.0]
    assert all(row.emitted == row.draft for row in kept if row.score is not None)
    assert any(row.emitted != row.target for row in kept)
    assert [sum(row.step == step for row in kept) for step in range(kept[-1].step)] == [1, *[8] * (kept[-1].step - 1)]


def test_what_the_engine_did_otherwise_is_refused(played: dict[float, list[Any]]) -> None:
    rows = played[0.0]
    same = response(rows)
    walkthrough.check(rows, same)
    wrong = [
        dataclasses.replace(same, tokens=[*same.tokens[:-1], same.tokens[-1] + 1]),
        dataclasses.replace(same, emitted=[*same.emitted[:-1], same.emitted[-1] + 1]),
        dataclasses.replace(same, decisions=[dataclasses.replace(same.decisions[0], probability=0.123)]),
    ]
    for other in wrong:
        with pytest.raises(ConfigError, match="complete a line differently"):
            walkthrough.check(rows, other)


def test_a_file_that_lists_no_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[[line]]\nname = "a"\nprompt = "b"\n')
    with pytest.raises(ConfigError, match="no list of"):
        walkthrough.read_lines(tmp_path / "a.toml")


def test_no_line_of_the_code_base_is_shown() -> None:
    root = Path(next(iter(importlib.util.find_spec("vllm").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    there = {line.strip() for path in root.rglob("*.py") for line in path.read_text(errors="replace").splitlines()}
    shown = [line.prompt + line.answer for line in walkthrough.read_lines(ROOT / walkthrough.LINES)]
    assert {line.strip() for text in shown for line in text.splitlines() if len(line.strip()) >= 12} & there == set()


def test_the_page_shows_the_result_file() -> None:
    page = (ROOT / "docs" / "walkthrough.md").read_text()
    result = json.loads((ROOT / "benchmarks" / "results" / "walkthrough.json").read_text())
    assert len(result["lines"]) == 3
    assert [line["prompt"] for line in result["lines"]] == [
        line.prompt for line in walkthrough.read_lines(ROOT / walkthrough.LINES)
    ]
    for line in result["lines"]:
        assert line["prompt"] in page
        assert walkthrough.markdown(line["learned"]["rows"]) in page
        for mode in ("strict", "learned"):
            assert f"`{line[mode]['line']}`" in page
