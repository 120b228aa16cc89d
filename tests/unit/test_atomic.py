"""A file or a directory is replaced as a whole, or stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_cospec import atomic
from vllm_cospec.atomic import new_directory, new_file, write_text


def replace(destination: Path) -> None:
    with new_directory(destination) as partial:
        (partial / "file").write_text("new")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    directory = tmp_path / "arbiter"
    directory.mkdir()
    (directory / "file").write_text("old")
    return directory


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_takes_the_place_of_another(
    can_exchange: bool, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    replace(kept)
    assert (kept / "file").read_text() == "new"
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", [1, 2])
def test_what_stood_there_stays_where_neither_name_could_be_given(
    failure: type[BaseException], moment: int, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On file systems that cannot exchange two names, interrupted behind the first renaming or before the second."""
    rename: Callable[[Path, Path], Path] = Path.rename
    calls: list[Path] = []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2 and moment == 2:
            raise failure
        found = rename(self, target)
        if len(calls) == moment == 1:
            raise failure
        return found

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(failure):
        replace(kept)
    assert (kept / "file").read_text() == "old"
    assert list(kept.parent.iterdir()) == [kept]


def test_a_file_that_was_not_finished_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    write_text(path, "old")

    def stop_half_way() -> None:
        with new_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
