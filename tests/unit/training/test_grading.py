"""One bad answer never ends a run: what a grader may do, injected, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from vllm_cospec.errors import ConfigError, RewardError
from vllm_cospec.training.config import TaskConfig
from vllm_cospec.training.tasks import Problem, grading
from vllm_cospec.training.tasks.grading import FailureWatch, Graders

PROBLEM = Problem("1/2+1/4?", "3/4", source="p.jsonl, line 12")


def task(reward: str = "bad_rewards:misbehave", **settings: object) -> TaskConfig:
    return TaskConfig.model_validate({"reward": reward, "reward_timeout_s": 1.0, **settings})


def test_every_way_to_fail_scores_0_is_named_and_leaves_the_others_alone() -> None:
    expected = {
        "raise": "raised KeyError: 'gold'",
        "hang": "took longer than 1 s (task.reward_timeout_s)",
        "compute": "took longer than 1 s",
        "exit": "ended its process (exit code 3)",
        "crash": "ended its process (signal SIGSEGV)",
        "memory": "raised MemoryError",
        "nan": "returned nan, which is no finite number",
        "text": "raised ValueError: could not convert string to float: 'good'",
        "none": "raised TypeError",
    }
    texts = [text for bad in expected for text in (bad, "fine")] + ["print", "x" * 1_000_000]
    with Graders(task()) as graders:
        graders.wait_until_ready()
        grades = graders.grade([PROBLEM] * len(texts), texts)
    for text, grade in zip(texts, grades, strict=True):
        if text in expected:
            assert grade.score == 0.0
            assert grade.failure.startswith("p.jsonl, line 12: reward of '1/2+1/4?' ")
            assert expected[text] in grade.failure
            assert f"the answer was {text!r}" in grade.failure
        else:
            assert (grade.score, grade.failure) == (float(len(text)), "")


@pytest.mark.parametrize("text", ["$9^{9^{9^{9}}}$", "$10^{10^{9}}$", "$(10^9)!$"])
def test_monstrous_mathematics_scores_0_in_the_time_allowed(text: str) -> None:
    with Graders(task("math_verify", reward_timeout_s=8.0)) as graders:
        graders.wait_until_ready()
        began = time.monotonic()
        assert [g.score for g in graders.grade([Problem("x", "5")] * 2, [text, "5"])] == [0.0, 1.0]
        assert time.monotonic() - began < 60


def test_a_start_that_took_too_long_is_not_taken_for_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The late word of a process that is ready would move every score to the answer behind its own."""
    with Graders(task()) as graders:
        graders.wait_until_ready()
        monkeypatch.setattr(grading, "START_TIMEOUT_S", 0.0)
        assert "took longer" in graders.grade([PROBLEM], ["hang"])[0].failure
        with pytest.raises(ConfigError, match="its grading process cannot be started"):
            graders.grade([PROBLEM], ["a"])
        monkeypatch.setattr(grading, "START_TIMEOUT_S", 300.0)
        assert [grade.score for grade in graders.grade([PROBLEM] * 3, ["bb", "ccc", "dddd"])] == [2.0, 3.0, 4.0]


def test_what_a_killed_grader_had_written_goes_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Graders(task("bad_rewards:litter")) as graders:
        graders.wait_until_ready()
        assert "took longer" in graders.grade([PROBLEM], ["hang"])[0].failure
        graders.grade([PROBLEM], ["fine"])
        (left,) = tmp_path.iterdir()  # the second one's
        assert [path.name for path in left.iterdir()] == ["litter"]
    assert list(tmp_path.iterdir()) == []


def test_time_limits_hold_off_the_main_thread() -> None:
    found = []

    def run() -> None:
        with Graders(task(reward_timeout_s=0.5)) as graders:
            graders.wait_until_ready()
            found.extend(graders.grade([PROBLEM] * 2, ["hang", "fine"]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    assert [grade.score for grade in found] == [0.0, 4.0]


def test_answers_are_graded_in_several_processes_that_end_with_the_pool() -> None:
    with Graders(task("bad_rewards:process", reward_processes=2)) as graders:
        graders.wait_until_ready()
        pids = {int(grade.score) for grade in graders.grade([PROBLEM] * 200, ["x"] * 200)}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_control_c_is_left_to_the_one_that_started_them() -> None:
    with Graders(task("bad_rewards:process")) as graders:
        graders.wait_until_ready()
        (before,) = graders.grade([PROBLEM], ["x"])
        os.kill(int(before.score), signal.SIGINT)
        (after,) = graders.grade([PROBLEM], ["x"])
    assert after == before


def test_processes_end_with_the_one_that_started_them_in_the_middle_of_a_calculation() -> None:
    program = """
import sys, time
from vllm_cospec.training.config import TaskConfig
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.grading import Graders
graders = Graders(TaskConfig(reward="bad_rewards:misbehave", reward_timeout_s=600.0))
graders.wait_until_ready()
graders.submit(Problem("p", "a"), "compute")
print("ready", flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        children = psutil.Process(parent.pid).children()
        assert len(children) == 1
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "nosuch:score"}, "task.reward: 'nosuch:score' cannot be imported"),
        ({"name": "jsonl", "options": {"path": "/nowhere"}}, "/nowhere: cannot be read"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_one_sentence(settings: dict[str, object], message: str) -> None:
    with Graders(TaskConfig.model_validate(settings)) as graders, pytest.raises(ConfigError, match=message):
        graders.wait_until_ready()


def test_a_run_ends_when_more_fail_than_is_allowed_beyond_doubt() -> None:
    watch = FailureWatch(0.01)
    watch.add(24, ["one"])  # 4 %, but it may be chance
    watch.add(1000, ["two", "three"])
    watch.add(100, ["four"] * 8)  # 1.07 %
    with pytest.raises(
        RewardError, match=r"31 of 1144 answers could not be graded, more than 0.01 of them; the last: x"
    ):
        watch.add(20, ["x"] * 20)
    with pytest.raises(RewardError, match="24 of 24"):
        FailureWatch(0.01).add(24, ["every"] * 24)
    watch = FailureWatch(0.0)
    with pytest.raises(RewardError, match="1 of 10"):
        watch.add(10, ["x"])  # nothing is allowed
