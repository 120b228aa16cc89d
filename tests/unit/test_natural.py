"""The code pair's answers: kept so that a run can go on, tabulated by lines that every mode has answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import benchmark

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks import Problem

natural = benchmark("natural")


def answer(mode: str, problem: int, right: bool, **others: Any) -> dict[str, Any]:
    fields = {
        "mode": mode, "problem": problem, "new": problem % 2 == 0, "right": right, "similarity": float(right),
        "tokens": 10, "steps": 4, "capped": False, "mismatches": 3, "overrides_at": [],
    }  # fmt: skip
    return {**fields, **others}


def keep(work: Path, rows: list[dict[str, Any]], num_problems: int, tail: str = "") -> Path:
    work.mkdir()
    (work / natural.ABOUT).write_text(json.dumps({"num_problems": num_problems}))
    (work / natural.ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return work


def test_a_learned_mode_names_its_arbiter() -> None:
    found = natural.contestants(
        ["strict", "a: learned(threshold=0.3)", "cascade(alpha=0.9)", "draft"], {"a": Path("x")}
    )
    assert [(one.mode.kind, one.arbiter, one.engine) for one in found] == [
        ("strict", None, "pair"), ("learned", Path("x"), "pair"), ("cascade", None, "pair"), ("draft", None, "draft"),
    ]  # fmt: skip
    assert found[1].mode.settings == {"threshold": 0.3}


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("learned", "no arbiter is called ''"),
        ("b: learned", "no arbiter is called 'b'; pass --arbiter b=DIRECTORY"),
        ("a: cascade(alpha=0.9)", "only learned takes an arbiter's name"),
    ],
)
def test_a_mode_that_cannot_be_asked_is_refused(mode: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=r"--mode: ") as refused:
        natural.contestants([mode], {"a": Path("x")})
    assert sentence in str(refused.value)


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    work = keep(tmp_path / "a", [answer("strict", 0, True)], 1, tail='{"mode": "strict", "prob')
    assert [row["problem"] for row in natural.read_answers(work)] == [0]
    config = natural.load_train_config(natural.CONFIG)
    asking = natural.Answering(config, work, [Problem("a", "b")] * 2, 0.0)
    assert asking.done == {("strict", 0)}
    with (work / natural.ANSWERS).open("a") as file:  # as a run does that goes on
        file.write(json.dumps(answer("strict", 1, True)) + "\n")
    assert [row["problem"] for row in natural.read_answers(work)] == [0, 1]


def test_the_acceptance_length_is_delivered_tokens_per_step_behind_the_prompts(tmp_path: Path) -> None:
    rows = [answer("strict", 0, True), answer("strict", 1, False, tokens=1, steps=1, overrides_at=[2, 5])]
    found, _ = natural.outcomes(keep(tmp_path / "a", rows, 2))
    assert found["strict"].counts.acceptance_length == pytest.approx(9 / 3)
    assert (found["strict"].counts.mismatches, found["strict"].counts.overrides) == (6, 2)


def test_only_modes_with_every_line_are_shown_and_paired_with_strict(tmp_path: Path) -> None:
    right = {"strict": [1, 0, 0, 0], "cascade(alpha=0.9)": [1, 1, 1, 0]}
    rows = [answer(mode, i, bool(r)) for mode, given in right.items() for i, r in enumerate(given)]
    rows.append(answer("draft", 0, True))
    work = keep(tmp_path / "a", rows, 4)
    table = natural.rows_of(work)
    assert list(table) == ["strict", "cascade(alpha=0.9)"]
    paired = table["cascade(alpha=0.9)"]["paired_vs_target"]
    assert (paired["difference"], paired["gained"], paired["lost"]) == (0.5, 2, 0)
    assert (table["strict"]["accuracy_new_lines"], table["strict"]["num_new_lines"]) == (0.5, 2)
    compared = natural.against(natural.outcomes(work)[0], ["cascade(alpha=0.9)"], ["strict", "draft"])
    assert list(compared) == ["cascade(alpha=0.9) - strict"]


def test_each_rule_is_tuned_by_accuracy_and_then_by_length() -> None:
    def row(name: str, accuracy: float, length: float) -> dict[str, Any]:
        return {"mode": name, "accuracy": accuracy, "acceptance_length": length}

    rows = [
        row("strict", 0.9, 2), row("draft", 0.9, 1), row("a: learned", 0.9, 3), row("random(rate=0.3)", 0.9, 3),
        row("cascade(alpha=0.8)", 0.5, 2.5), row("cascade(alpha=0.9)", 0.5, 2.6), row("kl(max_kl=1.0)", 0.4, 3),
    ]  # fmt: skip
    assert natural.tuned({r["mode"]: r for r in rows}) == {"cascade": "cascade(alpha=0.9)", "kl": "kl(max_kl=1.0)"}


def test_acceptance_lengths_are_compared_with_stricts_on_resampled_lines() -> None:
    def rows(steps: list[int]) -> list[dict[str, Any]]:
        return [{"tokens": 13, "steps": count} for count in steps]

    kept = {"strict": rows([7, 7, 7]), "draft": rows([13] * 3), "kl(max_kl=1.0)": rows([7, 5, 4])}
    found = natural.times_strict(kept)
    assert list(found) == ["kl(max_kl=1.0)"]
    assert found["kl(max_kl=1.0)"]["times_strict"] == pytest.approx((36 / 13) / 2)
    low, high = found["kl(max_kl=1.0)"]["ci95"]
    assert (low, high) == pytest.approx((1.0, 2.0))  # one of the lines three times
    assert natural.times_strict({"draft": rows([13])}) == {}


def test_modes_are_compared_as_they_were_asked_where_nothing_was_tuned(tmp_path: Path) -> None:
    right = {"a: learned(threshold=0.5)": [1, 1, 1, 0], "mixture(weight=0.5)": [1, 0, 0, 0]}
    rows = [answer(mode, i, bool(r)) for mode, given in right.items() for i, r in enumerate(given)]
    path = tmp_path / "figures.json"
    natural.report(None, keep(tmp_path / "test", rows, 4), path)
    found = json.loads(path.read_text())
    (pair,) = found["paired"].values()
    assert (pair["gained"], pair["lost"]) == (2, 0)
    assert list(found["test"]["modes"]) == list(right)
    assert "best_rule" not in found
    with pytest.raises(ConfigError, match=r"^--calibration, --test: name a directory"):
        natural.report(None, None, None)
