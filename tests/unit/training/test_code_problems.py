"""Functions to write: HumanEval's and MBPP's format, the code of a response, what its tests say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import RolloutConfig, TaskConfig, bundled, load_train_config
from vllm_cospec.training.preflight import check_answers, check_time_limits
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.tasks import Problem, Task, load_task
from vllm_cospec.training.tasks.code_problems import CodeTask, code_of, read_code
from vllm_cospec.training.tasks.grading import Graders

STUB = 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """ Add them up.\n    """\n'
HUMAN_EVAL = {
    "task_id": "Test/0", "prompt": STUB, "entry_point": "total", "canonical_solution": "    return sum(numbers)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}  # fmt: skip
MBPP = {
    "text": "Write a function to double a number.", "code": "def twice(x):\n    return 2 * x", "task_id": 1,
    "test_setup_code": "import math", "test_list": ["assert set([twice(2)]) == {4}", "assert twice(math.inf) > 0"],
}  # fmt: skip


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    path = write(tmp_path / "c.jsonl", HUMAN_EVAL, MBPP)
    return load_task("code", path=path, test_path=path, timeout_s=2.0, memory_gb=0.5)


def problem(task: Task, entry_point: str) -> Problem:
    assert isinstance(task, CodeTask)
    return next(p for p in task.everything("test") if p.metadata["entry_point"] == entry_point)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("    return sum(numbers)\n", 1.0),
        ("    result = 0\n    for n in numbers:\n        result += n\n    return result\n\nprint(nonsense", 1.0),
        ("    return max(numbers)\n", 0.0),
        (f"```python\n{STUB}    return sum(numbers)\n```", 1.0),
        ("<think>```python\ndef total(x): return 7\n```</think>Here:\n```py\ndef total(x):\n  return sum(x)\n```", 1.0),
        ("```python\ndef total(x): return sum(x)\n```\nUse it so:\n```python\nprint(total([1]))\n```", 1.0),
        ("def total(numbers: List[int]) -> int:\n    return sum(numbers)", 1.0),
        ("```python\ndef total(x):\n    import os\n    os._exit(0)\n```", 0.0),
        ("```python\ndef total(x):\n    while True: pass\n```", 0.0),
        ("```python\ndef total(x):\n    return sum(x", 0.0),
        ("I cannot.", 0.0),
        ("", 0.0),
    ],
)
def test_a_completion_or_a_whole_function_is_right_when_its_tests_pass(task: Task, text: str, score: float) -> None:
    assert task.score(problem(task, "total"), text) == score


def test_mbpp_is_asked_with_its_tests_where_the_template_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", MBPP)
    task = load_task("code", path=path, test_path=path, template="{prompt} Pass:\n{tests}\nCall it {entry_point}.")
    found = problem(task, "twice")
    assert found.prompt == f"{MBPP['text']} Pass:\n" + "\n".join(MBPP["test_list"]) + "\nCall it twice."  # type: ignore[arg-type]
    assert task.score(found, "```python\ndef twice(x):\n    return x + x\n```") == 1.0
    assert task.score(found, "```python\ndef twice(x):\n    return 4\n```") == 1.0  # all that the tests ask
    assert task.score(found, "```python\ndef double(x):\n    return 2 * x\n```") == 0.0


def test_a_program_of_tests_and_records_that_are_none() -> None:
    own = read_code({"prompt": "p", "tests": "assert f() == 1", "entry_point": "f"}, "line 1")
    assert own.metadata["tests"] == "assert f() == 1"
    assert code_of("x\n```\ndef f(): return 1\n```", "f") == "def f(): return 1"


def test_solutions_that_fail_their_own_tests_are_named_before_anything_starts(tmp_path: Path) -> None:
    wrong = {**MBPP, "code": "def twice(x):\n    return 3 * x"}
    config = load_train_config(bundled("target").parents[2] / "training" / "configs" / "demo.toml")
    for records, message in (((HUMAN_EVAL, MBPP), ""), ((HUMAN_EVAL, wrong), r"c.jsonl, line 2: the solution does")):
        path = write(tmp_path / "c.jsonl", *records)
        options = {"path": path, "test_path": path}
        config = config.model_copy(update={"task": TaskConfig(name="code", options=options)})
        problems = Problems(config.pair, config.task, RolloutConfig())
        check_time_limits(config, problems)
        if message:
            with pytest.raises(ConfigError, match=message):
                check_answers(config, problems, problems.known("test"))
        else:
            check_answers(config, problems, problems.known("test"))
    slow = config.model_copy(update={"task": TaskConfig(name="code", options=options, reward_timeout_s=5.0)})
    with pytest.raises(ConfigError, match=r"task.reward_timeout_s: 5 leaves no time beside task.options.timeout_s = 5"):
        check_time_limits(slow, problems)
    with pytest.raises(ConfigError, match=r"c.jsonl, line 1: needs test and entry_point .* the fields here are 'q'"):
        load_task("code", path=write(tmp_path / "c.jsonl", {"q": 1}))


def test_answers_are_run_from_a_grading_process(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", HUMAN_EVAL)
    settings = TaskConfig(name="code", options={"path": path, "test_path": path, "timeout_s": 2.0})
    question = load_task(settings.name, **settings.options).problems(0, 1, "test")[0]
    with Graders(settings) as graders:
        texts = ["    return sum(numbers)", "    return 0", "    while True: pass"]
        assert [(g.score, g.failure) for g in graders.grade([question] * 3, texts)] == [(1.0, ""), (0.0, ""), (0.0, "")]
