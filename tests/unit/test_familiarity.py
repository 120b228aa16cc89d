"""Lines a draft does not know are left to the target, and what would have come of that is said rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import benchmark
from transformers import AutoModelForCausalLM

import vllm_cospec.demo

natural, familiarity = benchmark("natural"), benchmark("familiarity")
STRICT: str = natural.BASELINE
CAREFUL: str
BOLD: str
CAREFUL, BOLD = familiarity.MODES


def answer(mode: str, problem: int, right: bool, steps: int) -> dict[str, Any]:
    return {
        "mode": mode, "problem": problem, "new": problem >= 2, "right": right, "similarity": 1.0, "tokens": 9,
        "steps": steps, "capped": False, "mismatches": 3, "overrides_at": [],
    }  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Four lines: the arbiter wins the first, which is known, and loses the last, which is new."""
    right = {STRICT: "0101", CAREFUL: "1100", BOLD: "1100"}
    steps = {STRICT: 5, CAREFUL: 3, BOLD: 2}
    rows = [answer(mode, i, digit == "1", steps[mode]) for mode, own in right.items() for i, digit in enumerate(own)]
    (tmp_path / natural.ABOUT).write_text(json.dumps({"num_problems": 4}))
    (tmp_path / natural.ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_above_the_cut_the_arbiter_answers_and_below_it_the_target(work: Path) -> None:
    answers = familiarity.AnsweredLines(work, np.array([2.0, 1.0, -1.0, -2.0]))
    found = answers.gated(CAREFUL, 0.0)
    assert (found["asked"], found["accuracy"]) == (0.5, 0.75)
    assert (found["accuracy_seen_lines"], found["accuracy_new_lines"]) == (1.0, 0.5)
    assert found["acceptance_length"] == pytest.approx(4 * 8 / (2 + 2 + 4 + 4))
    assert {mode: (pair["gained"], pair["lost"]) for mode, pair in found["paired"].items()} == {
        STRICT: (1, 0), CAREFUL: (1, 0),
    }  # fmt: skip
    everywhere = answers.gated(BOLD, None)
    assert (everywhere["asked"], everywhere["accuracy"], everywhere["acceptance_length"]) == (1.0, 0.5, 8.0)


def test_it_is_said_how_well_familiarity_tells_lines_apart(work: Path) -> None:
    found = familiarity.AnsweredLines(work, np.array([2.0, -1.0, 1.0, -2.0])).about()
    assert found["auc, seen against new lines"] == 0.75
    assert found[f"auc, {CAREFUL}: gained against lost"] == 1.0


def test_the_likelihood_of_a_prompt_is_the_mean_over_its_tokens() -> None:
    model = AutoModelForCausalLM.from_pretrained(Path(vllm_cospec.demo.__file__).parent / "draft").eval()
    ids = [5, 9, 3, 7]
    counted: list[int] = []
    (found,) = familiarity.log_likelihood(model, [ids], lambda count, _: counted.append(count))
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert found == pytest.approx(-float(loss), rel=1e-5)
    assert counted == [1]


def test_only_the_end_of_a_long_prompt_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(familiarity, "WINDOW", 2)
    model = AutoModelForCausalLM.from_pretrained(Path(vllm_cospec.demo.__file__).parent / "draft").eval()
    ids = torch.tensor([[5, 9, 3, 7, 8]])
    (found,) = familiarity.log_likelihood(model, ids.tolist(), lambda count, _: None)
    with torch.no_grad():
        own = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    assert found == pytest.approx(float(own[2, 7] + own[3, 8]) / 2, rel=1e-5)
