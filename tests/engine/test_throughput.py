"""The throughput benchmark: real servers, and what becomes of its results when one dies or the user has enough."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from descendants import descendants, survivors
from scripts import benchmark

from vllm_cospec.errors import CoSpecError
from vllm_cospec.training.tasks import load_task

RunEngine = Callable[..., dict[str, Any]]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throughput.py"
MODE_KEYS = {
    "mode", "tokens_per_s", "requests_per_s", "ttft_ms_p50", "tpot_ms_p50", "itl_ms_p99", "acceptance_length",
    "acceptance_per_position", "num_mismatches", "num_overrides", "accuracy", "accuracy_ci95", "paired_vs_target",
    "mean_output_tokens", "length_cap_hits",
}  # fmt: skip


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_a_server_that_dies_ends_the_run_and_leaves_the_figures_of_the_rounds_before(tmp_path: Path) -> None:
    path, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    process = start(
        "--modes", "target,learned", "--num-prompts", "12", "--rounds", "100000", "--json", str(path),
        "--plot", str(plot),
    )  # fmt: skip
    wait_for(path.exists, process)
    below = descendants(process.pid)  # engine cores among them
    for server in descendants(process.pid, "--speculative-config"):
        server.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("throughput: ")
    assert "partial results are above" in errors
    assert "Traceback" not in errors
    assert not survivors(below, timeout=20)
    figures = json.loads(path.read_text())
    assert figures["schema"] == 1
    assert figures["complete"] is False
    assert figures["environment"]["vllm"]
    target, learned = figures["modes"]
    assert set(target) >= MODE_KEYS
    assert (target["mode"], learned["mode"]) == ("target", "learned")
    assert target["acceptance_length"] == 1.0
    assert target["num_overrides"] == 0
    assert learned["acceptance_length"] > 4
    assert 0 < learned["num_overrides"] <= learned["num_mismatches"]
    assert learned["accuracy"] >= target["accuracy"]
    low, high = learned["accuracy_ci95"]
    assert 0 <= low <= learned["accuracy"] <= high <= 1
    assert set(learned["paired_vs_target"]) >= {"gained", "lost", "p_value"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(600)
def test_what_lies_beside_a_base_model_moves_no_figure(pair: Path, run_engine: RunEngine, tmp_path: Path) -> None:
    """No chat template, and sampling defaults of its own: it is asked for the same, as a text, and says the same."""
    target = Path(shutil.copytree(pair / "target", tmp_path / "base", ignore=shutil.ignore_patterns("*.jinja")))
    written = json.loads((target / "generation_config.json").read_text())
    defaults = written | {"repetition_penalty": 1.3, "max_new_tokens": 3}
    (target / "generation_config.json").write_text(json.dumps(defaults))
    task, path = load_task("demo"), tmp_path / "figures.json"
    problems = task.problems(2026, 16, "test")
    engine = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
    process = start(
        "--target", str(target), "--draft", str(pair / "draft"), "--modes", "target", "--task", "demo",
        "--num-prompts", "16", "--rounds", "1", "--max-tokens", "60", "--engine", json.dumps(engine),
        "--json", str(path),
    )  # fmt: skip
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-2000:]
    (figures,) = json.loads(path.read_text())["modes"]
    greedy = {"temperature": 0, "max_tokens": 60}
    asked = [{"name": "run", "prompts": [problem.prompt for problem in problems], "params": greedy}]
    answers = [completions[0] for completions in run_engine(asked)["runs"]["run"]]
    scores = [task.score(problem, answer["text"]) for problem, answer in zip(problems, answers, strict=True)]
    assert 0 < sum(scores) < 16
    assert figures["accuracy"] == sum(scores) / 16
    assert figures["mean_output_tokens"] == sum(len(answer["token_ids"]) for answer in answers) / 16


@pytest.mark.timeout(300)
def test_ctrl_c_during_the_start_leaves_no_server_behind() -> None:
    process = start("--modes", "standard", "--num-prompts", "4", "--rounds", "1")
    wait_for(lambda: descendants(process.pid, "--speculative-config"), process)
    below = descendants(process.pid)  # processes that grade among them
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "throughput: interrupted; no round was finished" in errors
    assert "Traceback" not in errors
    assert not survivors(below, timeout=20)


def test_whatever_a_user_gets_wrong_is_told_before_a_server_starts(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1+1?", "answer": "2"}\n{"prompt": 3}\n')
    command = benchmark("command").application(benchmark("throughput").main)
    for options, message in (
        (("--modes", "nosuch"), "--modes: unknown mode 'nosuch'; known are target, draft, standard, "),
        (("--draft", "./nosuch"), "pair.draft: no model at "),
        (("--arbiter", "./nosuch", "--modes", "learned"), "arbiter: no directory at './nosuch'"),
        (("--dataset", str(broken)), "broken.jsonl, line 2: 'prompt' must be a text"),
        (("--num-prompts", "2", "--rounds", "3", "--partition"), "--partition: 2 problems are too few for 3 rounds"),
    ):
        with pytest.raises(CoSpecError, match=re.escape(message)):
            command(options, standalone_mode=False)
