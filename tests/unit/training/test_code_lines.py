"""The task code_lines and the splits behind it, on a package written for the test."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import bundled
from vllm_cospec.training.tasks import FurtherFigures, Problem, code_lines, digest, load_task
from vllm_cospec.training.tasks.code_corpus import BUCKETS, fingerprint, group_files, read_corpus, split_of_file
from vllm_cospec.training.tasks.code_lines import Place, check_corpus, half_of, lines_of_code, similarity

FILE = '''"""A docstring
that goes over lines."""
import first_module
from second_module import (
    something_long,
)
# a comment that is long enough
value = compute_value(first)  # counted with its comment

@decorator_of(some_argument)
def function(argument: int) -> str:
    """Another docstring here."""
    text = """several
    lines of one string
    """
    "a string alone, as a statement"
    short = 1
    return render(argument, (
        import_like_name, other,
        "a string on its own line",
        f"formatted {argument} here",
    ))
'''


def test_only_lines_of_code_are_asked_for() -> None:
    lines = FILE.split("\n")
    assert [lines[row].strip() for row in lines_of_code(FILE)] == [
        "value = compute_value(first)  # counted with its comment",
        "def function(argument: int) -> str:",
        "return render(argument, (",
        "import_like_name, other,",
    ]
    assert lines_of_code("def broken(:\n    '''never closed\n") == []
    assert lines_of_code("x" * 89 + " = 1\n" + "y" * 86 + " = 1\n") == [1]


def program(seed: int, length: int = 60) -> str:
    rng = random.Random(seed)
    names = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(20)]
    return "".join(f"{rng.choice(names)} = {rng.choice(names)}({rng.choice(names)}, {i})\n" for i in range(length))


def test_files_that_share_code_go_to_one_split() -> None:
    copied, moved = program(1), program(2)
    texts = {
        "a/one.py": copied,
        "b/two.py": program(3) + "\n".join(copied.split("\n")[:30]),
        "c/three.py": moved,
        "d/four.py": "import something\n# licence\n" + moved + program(4, 3),
        "e/five.py": program(5),
        "e/empty.py": "",
    }
    groups = group_files(texts)
    assert groups["b/two.py"] == "a/one.py"
    assert groups["d/four.py"] == "c/three.py"
    assert [path for path, leader in groups.items() if path == leader] == [
        "a/one.py", "c/three.py", "e/five.py", "e/empty.py",
    ]  # fmt: skip
    assert group_files(dict(reversed(texts.items()))) == groups


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "code_base_of_the_test"
    for number in range(40):
        file = root / f"part{number % 8}" / f"module{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(program(100 + number))
    (root / "__init__.py").write_text("raise SystemExit('is not to be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    read_corpus.cache_clear()
    code_lines.candidates.cache_clear()
    return root


def options(package: Path) -> dict[str, str]:
    return {"package": package.name, "tokenizer": str(bundled("target"))}


def test_a_file_is_in_the_split_its_path_stands_for_and_fingerprints_tell_changes(package: Path) -> None:
    sources = read_corpus(package.name)
    assert len(sources) == 41
    assert all(source.split == split_of_file(source.path) for source in sources)
    assert {source.split for source in sources} == set(BUCKETS)
    before = fingerprint(sources)
    changed = next(source for source in sources if source.split == "test")
    (package / changed.path).write_text(changed.text + "\n")
    read_corpus.cache_clear()
    after = fingerprint(read_corpus(package.name))
    assert [split for split in BUCKETS if before[split] != after[split]] == ["test"]


def test_a_problem_is_a_line_cut_in_its_first_half_after_the_lines_before_it(package: Path) -> None:
    task = load_task("code_lines", **options(package))
    problems = task.problems(1, 60, "train")
    assert len({problem.prompt for problem in problems}) == 60
    assert task.problems(1, 20, "train") == problems[:20] != task.problems(2, 20, "train")
    for problem in problems:
        place = problem.metadata
        lines = (package / place.path).read_text().split("\n")
        assert split_of_file(place.path) == "train"
        *before, begun = problem.prompt.split("\n")
        assert before == lines[place.line - 1 - len(before) : place.line - 1]
        assert code_lines.LEAST_CONTEXT <= sum(len(line) + 1 for line in before) <= code_lines.CONTEXT
        assert (begun + problem.answer).replace(" ", "") == place.text.replace(" ", "")
        assert place.text == lines[place.line - 1]
        assert place.text.startswith(begun)
        assert place.text.endswith(problem.answer)
        assert 0 < len(begun) <= len(place.text) / 2
    with pytest.raises(ConfigError, match="problems for calibration, 100000 were asked for"):
        task.problems(1, 100_000, "calibration")


def test_the_halves_of_a_package_share_no_directory(package: Path) -> None:
    paths = [
        {p.metadata.path for p in load_task("code_lines", half=half, **options(package)).problems(1, 30, "pretrain")}
        for half in ("first", "second")
    ]
    directories = [{path.split("/")[0] for path in own} for own in paths]
    assert not directories[0] & directories[1]
    assert half_of("a/b/c/d.py") == half_of("a/b/e.py")


def test_an_answer_is_the_rest_of_the_line_and_nothing_else(package: Path) -> None:
    task = load_task("code_lines", **options(package))
    problem = Problem("x = f", "oo(bar)", Place("a.py", 1, "x = foo(bar)"))
    assert task.score(problem, "oo(bar)") == task.score(problem, " oo(bar) \n    more") == 1.0
    assert task.score(problem, "oo(bar) # why") == task.score(problem, "oo(baz)") == task.score(problem, "") == 0.0
    assert similarity("abcd", "abcd") == 1.0
    assert similarity("abcd", "abxd") == 0.75
    assert similarity("abcd", "") == 0.0


def test_figures_tell_lines_that_the_draft_was_trained_on_apart(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_lines, "LEARNT_PACKAGE", package.name)
    monkeypatch.setattr(code_lines, "cached_pair", lambda name: tmp_path / name)  # whether one is built or not
    code_lines.learnt_lines.cache_clear()
    task = load_task("code_lines", **options(package))
    assert isinstance(task, FurtherFigures)
    old = next(
        source for source in read_corpus(package.name) if source.split == "pretrain" and len(source.lines) > 3
    ).lines[3]
    problems = [Problem(old[:5], old[5:], Place("a.py", 4, old)), Problem("x = f", "oo(bar)", Place("b.py", 1, "new"))]
    assert task.figures(problems, [old[5:], "oo(bay)"]) == {
        "edit_similarity": pytest.approx((1 + 12 / 14) / 2), "accuracy_new_lines": 0.0, "num_new_lines": 1,
    }  # fmt: skip
    code_lines.learnt_lines.cache_clear()


def test_a_missing_package_or_tokenizer_is_refused(package: Path) -> None:
    with pytest.raises(ConfigError, match="package: 'no_such_package' is not installed"):
        load_task("code_lines", package="no_such_package")
    task = load_task("code_lines", package=package.name, tokenizer=str(package))
    with pytest.raises(ConfigError, match=r"task\.options\.tokenizer: none in .*; run make code-pair"):
        task.problems(1, 1)


def test_another_version_than_the_draft_learnt_is_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_lines, "LEARNT_PACKAGE", package.name)
    record = tmp_path / "training.json"
    check_corpus(package.name, record)  # no pair yet
    splits = fingerprint(read_corpus(package.name))
    record.write_text(json.dumps({"version": "1.2", "splits": splits}))
    check_corpus(package.name, record)
    record.write_text(json.dumps({"version": "1.2", "splits": {**splits, "test": splits["train"]}}))
    with pytest.raises(ConfigError, match=f"install {package.name} 1.2, or train a draft"):
        check_corpus(package.name, record)
    check_corpus("typer", record)  # another code base


def test_a_digest_tells_any_two_sets_of_problems_apart() -> None:
    problems = [Problem("a", "b"), Problem("c", "d")]
    others = [Problem("a", "bc"), Problem("", "d")], problems[:1], problems[::-1]
    assert len({digest(own) for own in (problems, *others)}) == 4
    assert digest(problems) == digest(list(problems))
