"""``cospec evaluate`` on the bundled pair: the same problems in every mode, the table in the artefact, all answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import IMPORTED, forked
from mode_answers import answers

from vllm_cospec.arbiter import load_artefact
from vllm_cospec.training.measure.evaluate import engine_of, rows_of
from vllm_cospec.training.measure.modes import at_temperature, parse_mode
from vllm_cospec.training.tasks import Problem, load_task

MODES = ["strict", "learned", "learned(threshold=1.0)"]  # they share one engine


@pytest.mark.engine
def test_modes_are_compared_on_the_same_problems(pair: Path, tmp_path: Path) -> None:
    arbiter, figures, per_question = tmp_path / "arbiter", tmp_path / "new" / "figures.json", tmp_path / "answers.jsonl"
    shutil.copytree(pair / "arbiter", arbiter)
    weights = (arbiter / "model.safetensors").read_bytes()
    command = [str(Path(sys.executable).with_name("cospec")), "evaluate", "--artefact", str(arbiter)]
    command += [argument for mode in MODES for argument in ("--mode", mode)]
    command += ["--problems", "60", "--seed", "9", "--json", str(figures), "--per-question", str(per_question)]
    done = subprocess.run([*command, "--record", "here"], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "60 test problems of demo, seed 9, greedy" in " ".join(done.stdout.split())
    rows = json.loads(figures.read_text())["modes"]
    assert list(rows) == MODES
    strict, learned, never = rows.values()
    assert strict["num_overrides"] == strict["num_mismatches"] == never["num_overrides"] == 0
    assert never["num_mismatches"] > 0  # asked, and never kept
    assert never["accuracy"] == strict["accuracy"]
    assert learned["accuracy"] > strict["accuracy"] + 0.2
    assert learned["acceptance_length"] > strict["acceptance_length"]
    assert learned["paired_vs_target"]["p_value"] < 0.001
    assert learned["accuracy_ci95"][0] < learned["accuracy"] < learned["accuracy_ci95"][1]

    task = load_task("demo")
    expected = [problem.prompt for problem in task.problems(seed=9, n=60, split="test")]
    lines = [json.loads(line) for line in per_question.read_text().splitlines()]
    texts = {mode: [line["text"] for line in lines if line["mode"] == mode] for mode in MODES}
    assert [line["prompt"] for line in lines[:: len(MODES)]] == expected
    assert texts["learned(threshold=1.0)"] == texts["strict"] != texts["learned"]
    assert all(line["score"] == task.score(Problem(line["prompt"], line["answer"]), line["text"]) for line in lines)

    _, recorded = load_artefact(arbiter)
    assert recorded.provenance.results["here"]["modes"].keys() == rows.keys()
    assert "## here (60 test problems of demo, seed 9, greedy)" in (arbiter / "README.md").read_text()
    assert (arbiter / "model.safetensors").read_bytes() == weights


def check_sampled(rows: list[dict[str, Any]]) -> None:
    assert [row["mode"] for row in rows] == ["target, sampled", "strict", "learned"]
    target, strict, learned = rows
    assert target["paired_vs_target"] is None
    assert abs(strict["paired_vs_target"]["difference"]) < 0.35  # other random numbers, the same distribution
    low, high = learned["paired_vs_target"]["bootstrap_ci95"]
    assert 0 < low < learned["paired_vs_target"]["difference"] < high


@pytest.mark.engine
def test_sampled_modes_are_compared_with_the_target_at_the_same_temperature(pair: Path) -> None:
    found: dict[str, Any] = {}
    modes = at_temperature([parse_mode("strict"), parse_mode("learned")], 1.0, "sampled")
    for kind in ("target", "learned"):
        own = [mode for mode in modes if engine_of(mode, artefact=True) == kind]
        found |= forked(answers, (kind, pair / "arbiter", own), IMPORTED)
    check_sampled(rows_of(found))


@pytest.mark.engine
@pytest.mark.slow  # the same by the whole command
def test_the_command_compares_sampled_modes(pair: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [str(Path(sys.executable).with_name("cospec")), "evaluate", "--artefact", str(pair / "arbiter")]
    command += ["--mode", "strict", "--mode", "learned", "--temperature", "1.0", "--baseline", "sampled"]
    command += ["--problems", "60", "--seed", "9", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(figures.read_text())
    assert result["problems"] == "60 test problems of demo, seed 9, temperature 1"
    check_sampled([{"mode": mode, **row} for mode, row in result["modes"].items()])
