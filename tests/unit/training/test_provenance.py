"""Results say where they come from and replace what stood there whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_cospec.training.measure.provenance import write_result


def test_a_result_names_machine_versions_date_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/cospec", "evaluate", "--mode", "cascade(alpha=0.9)"])
    path = tmp_path / "new" / "result.json"
    write_result(path, {"accuracy": 0.5})
    written = json.loads(path.read_text())
    assert written["accuracy"] == 0.5
    assert written["command"] == "cospec evaluate --mode 'cascade(alpha=0.9)'"
    described = written["environment"]
    assert set(described) == {"date", "vllm", "torch", "python", "machine", "cpu", "cpu_capability", "cpus", "gpu"}
    assert described["vllm"].startswith("0.3")
    assert described["cpus"] >= 1
    assert described["gpu"] is None


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, {"accuracy": 0.5})
    with pytest.raises(TypeError):
        write_result(path, {"accuracy": object()})
    assert json.loads(path.read_text())["accuracy"] == 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
