"""The independent replay of recorded decisions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_cospec.demo

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "code" / "replay.py"


@pytest.fixture(scope="module")
def replay() -> Any:
    spec = importlib.util.spec_from_file_location("replay", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models() -> list[Any]:
    pair = Path(vllm_cospec.demo.__file__).parent
    return [AutoModelForCausalLM.from_pretrained(pair / role).eval() for role in ("target", "draft")]


def greedy(model: Any, ids: list[int]) -> int:
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


def test_it_imports_nothing_of_the_project() -> None:
    imports = [line for line in SCRIPT.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "cospec" in line or "benchmarks" in line]


def test_the_drafts_token_stands_where_it_was_kept(replay: Any, models: list[Any]) -> None:
    pair = Path(vllm_cospec.demo.__file__).parent
    ids = AutoTokenizer.from_pretrained(pair / "target")("93*7+318+12*4?")["input_ids"]
    tokens = replay.complete(models, ids, {1, 3}, {2})
    assert len(tokens) > 4
    for at, token in enumerate(tokens):
        assert token == greedy(models[at in (1, 3)], ids + tokens[:at])
