"""Tasks from files and generators."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks import Problem, load_task

GSM8K = Path(os.environ.get("GSM8K_DIRECTORY", "not given"))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def numbered(path: Path, count: int) -> Path:
    return write(path, *({"prompt": f"{i} plus 1?", "answer": str(i + 1)} for i in range(count)))


def test_splits_of_a_file_are_disjoint_and_seeded(tmp_path: Path) -> None:
    task = load_task("jsonl", path=str(numbered(tmp_path / "p.jsonl", 600)))
    splits = {split: task.problems(1, 20, split) for split in ("train", "calibration", "test")}
    prompts = [p.prompt for problems in splits.values() for p in problems]
    assert len(set(prompts)) == 60
    assert splits["train"] == task.problems(1, 20, "train")
    assert splits["train"] != task.problems(2, 20, "train")


def test_a_test_file_is_the_test_split_and_never_trained_on(tmp_path: Path) -> None:
    everything = numbered(tmp_path / "p.jsonl", 300)
    tests = write(tmp_path / "t.jsonl", {"prompt": "5 plus 1?", "answer": "6"}, {"prompt": "new?", "answer": "1"})
    task = load_task("jsonl", path=str(everything), test_path=str(tests))
    assert {p.prompt for p in task.problems(0, 2, "test")} == {"5 plus 1?", "new?"}
    with pytest.raises(ConfigError, match="2 problems for test, 3 were asked for"):
        task.problems(0, 3, "test")
    for n in range(200, 300):
        try:
            trained = task.problems(0, n, "train")
        except ConfigError:
            break
        assert "5 plus 1?" not in {p.prompt for p in trained}


def test_the_template_wraps_the_prompt(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 200)
    task = load_task("jsonl", path=str(path), template="Q: {prompt} {x}\nA:")
    assert all(p.prompt.startswith("Q: ") and p.prompt.endswith(" {x}\nA:") for p in task.problems(0, 5))


@pytest.mark.skipif(not (GSM8K / "train.jsonl").exists(), reason="GSM8K_DIRECTORY names no directory with train.jsonl")
def test_gsm8k_is_read_and_scored() -> None:
    task = load_task("jsonl", path=str(GSM8K / "train.jsonl"), test_path=str(GSM8K / "test.jsonl"))
    problems = task.problems(0, 1319)
    janet = next(p for p in problems if p.prompt.startswith("Janet\u2019s ducks"))
    assert janet.answer == "18"
    assert task.score(janet, "She makes $18 every day.") == 1.0
    assert task.score(janet, "She makes $17 every day.") == 0.0
    assert all(p.answer.lstrip("-").replace(".", "").isdigit() for p in problems)
    assert len(task.problems(0, 6000, "train")) == 6000


GOOD = {"prompt": "a?", "answer": "b"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ({"prompt": "x"}, "line 2: 'answer' must be a text"),
        ({"answer": "x"}, "line 2: 'prompt' must be a text"),
        ({"prompt": "", "answer": "x"}, "line 2: 'prompt' must be a text"),
        ({"prompt": 5, "answer": "x"}, "line 2: 'prompt' must be a text that is not empty, is 5"),
        ({"prompt": "x", "answer": None}, "line 2: 'answer' must be a text that is not empty, is None"),
        ({"prompt": "x", "answer": True}, "line 2: 'answer' must be a text that is not empty, is True"),
        ({"prompt": "x", "answer": ["5"]}, "line 2: 'answer' must be a text"),
        ('{"prompt": "x", "answer": NaN}', "line 2: not valid JSON"),
        ({"prompt": "x\ud83d", "answer": "5"}, "line 2: 'prompt' holds half of a surrogate pair"),
        ({"problem": "x", "solution": "5"}, "line 2: 'prompt' .*the fields here are 'problem', 'solution'"),
        ({"question": "x", "answer": "no result\n####"}, "line 2: 'answer' has nothing behind its last '####'"),
        ({"prompt": "a?", "answer": "c"}, "line 2: has the prompt of line 1 with another answer, 'c' instead of 'b'"),
        ({"question": "x", "answer": "5"}, "line 2: 'answer' has no '####'"),
        ("[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path, bad: object, message: str) -> None:
    path = write(tmp_path / "broken.jsonl", GOOD, bad)
    with pytest.raises(ConfigError, match=message) as caught:
        load_task("jsonl", path=str(path))
    assert "broken.jsonl" in str(caught.value)


def only(path: Path, **options: object) -> Problem:
    """The first problem of a file."""
    task = load_task("jsonl", path=str(path), **options)
    return next(p for split in ("train", "calibration", "test") for p in task.everything(split))  # type: ignore[attr-defined]


def test_lines_may_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, "{", {"prompt": "a?", "answer": "c"}, {"prompt": "d?", "answer": "e"})
    task = load_task("jsonl", path=str(path), bad_lines="leave_out")
    assert task.left_out == 2  # type: ignore[attr-defined]
    every = [p for split in ("train", "calibration", "test") for p in task.everything(split)]  # type: ignore[attr-defined]
    assert {(p.prompt, p.answer) for p in every} == {("a?", "b"), ("d?", "e")}
    with pytest.raises(ConfigError, match=r"holds no problem .*line 1: not valid JSON"):
        load_task("jsonl", path=str(write(tmp_path / "q.jsonl", "{")), bad_lines="leave_out")


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ('\ufeff{"prompt": "q", "answer": "1"}\n', "1"),
        ('{"prompt": "q", "answer": "1"}\r\n\r\n', "1"),
        ('\n  \n\t\n{"prompt": "q", "answer": " 1 "}\n\n', "1"),
        ('{"prompt": "q\u2028r", "answer": "1"}\n', "1"),
        ('{"prompt": "q", "answer": 42}', "42"),
        ('{"prompt": "q", "answer": 0.50}', "0.50"),
        ('{"prompt": "q", "answer": 12345678901234567890}', "12345678901234567890"),
        ('{"prompt": "q", "answer": "1"}\n{"prompt": "q", "answer": "1.0"}', "1"),
        ('{"question": "q", "answer": "so\\n#### -1,234"}', "-1234"),
        ('{"question": "q", "answer": "#### +5"}', "5"),
        ('{"question": "q", "answer": "#### $18.00"}', "18.00"),
        ('{"question": "q", "answer": "#### -$5"}', "-5"),
        ('{"question": "q", "answer": "####5"}', "5"),
        ('{"question": "q", "answer": "#### 1 234"}', "1234"),
        ('{"question": "q", "answer": "#### 3\\n#### 4"}', "4"),
        ('{"question": "q", "answer": "#### \u22127"}', "-7"),
        ('{"question": "q", "answer": "#### 3/4"}', "3/4"),
        ('{"prompt": "q", "answer": "steps\\nso \\\\boxed{\\\\frac{1}{2}}."}', "\\frac{1}{2}"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_as_people_have_them_are_read_with_the_right_answer(
    tmp_path: Path, raw: str, answer: str, packed: bool
) -> None:
    path = tmp_path / ("p.jsonl.gz" if packed else "p.jsonl")
    path.write_bytes(gzip.compress(raw.encode()) if packed else raw.encode())
    problem = only(path)
    assert problem.answer == answer
    assert problem.source.startswith(f"{path}, line ")
    assert load_task("jsonl", path=str(path)).score(problem, f"The answer is \\boxed{{{answer}}}.") == 1.0
    assert load_task("jsonl", path=str(path)).score(problem, "The answer is \\boxed{777}.") == 0.0


def test_other_keys_and_formats_are_named_by_settings_and_other_fields_reach_the_grader(tmp_path: Path) -> None:
    line = {"problem": "q", "solution": "x\n\\boxed{3}", "level": 5, "tags": [1.5, "a"]}
    problem = only(write(tmp_path / "p.jsonl", line), prompt_key="problem", answer_key="solution")
    assert (problem.prompt, problem.answer) == ("q", "3")
    assert problem.metadata == {"level": 5, "tags": [1.5, "a"]}
    bare = write(tmp_path / "q.jsonl", {"question": "q", "answer": "5"})
    assert only(bare, answer_format="plain").answer == only(bare, prompt_key="question").answer == "5"
    with pytest.raises(ConfigError, match=r"answer_format = \"plain\""):
        only(bare)
    with pytest.raises(ConfigError, match=r"has no \\boxed\{\}"):
        only(bare, answer_format="boxed")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("missing", "cannot be read"), ("empty", "holds no problem"), ("binary", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            load_task("jsonl", path=str(tmp_path / name))


def test_unknown_tasks_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="known tasks: code, code_lines, dataset, demo, jsonl"):
        load_task("gsm")
    with pytest.raises(ConfigError, match=r"task.options.level: unknown key"):
        load_task("demo", level=3)
    with pytest.raises(ConfigError, match=r"task.options.path: missing"):
        load_task("jsonl")


def test_reasoning_gym_generators_work_by_name() -> None:
    task = load_task("reasoning_gym", generator="chain_sum", config={"max_terms": 3})
    train, test = task.problems(3, 40, "train"), task.problems(3, 40, "test")
    assert train == task.problems(3, 40, "train")
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert task.score(train[0], train[0].answer) == 1.0
    assert task.score(train[0], "no idea") < 1.0
    for generator, config in (("no_such", {}), ("chain_sum", {"min_terms": -1}), ("chain_sum", {"terms": 1})):
        with pytest.raises(ConfigError, match="is refused"):
            load_task("reasoning_gym", generator=generator, config=config)
