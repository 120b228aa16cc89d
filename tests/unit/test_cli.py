"""What a user gets wrong on the command line ends in one sentence and an exit code, never in a traceback."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

import vllm_cospec.demo
from vllm_cospec import cli
from vllm_cospec.arbiter import Arbiter, load_artefact
from vllm_cospec.training import commands

DEMO = Path(vllm_cospec.demo.__file__).parent
ARBITER = str(DEMO / "arbiter")
PAIR = '[pair]\ntarget = "{target}"\ndraft = "bundled:draft"\nnum_speculative_tokens = 3\n'
BUNDLED = PAIR.format(target="bundled:target")


@pytest.fixture
def cospec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command in an empty directory; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cospec", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def evaluate(*arguments: str) -> list[str]:
    return ["evaluate", "--artefact", ARBITER, *arguments]


WRONG = {
    "train without a file": (["train", "--config", "nosuch", "--output", "x"], "nosuch: cannot be read"),
    "train with a directory": (["train", "--config", ".", "--output", "x"], ".: cannot be read"),
    "inspect nothing": (["inspect", "/nonexistent"], "/nonexistent: no arbiter here (config.json is missing)"),
    "inspect a model": (["inspect", str(DEMO / "target")], "config.json"),
    "inspect a file": (["inspect", "/etc/passwd"], "/etc/passwd: no arbiter here"),
    "calibrate nothing": (["calibrate", "/nonexistent"], "/nonexistent: no arbiter here"),
    "calibrate by nothing": (["calibrate", ARBITER, "--config", "nosuch"], "nosuch: cannot be read"),
    "unknown mode": (
        ["evaluate", "--mode", "bad"],
        "unknown mode 'bad'; known are target, draft, standard, strict",
    ),
    "mode out of range": (["evaluate", "--mode", "cascade(alpha=2)"], "alpha: input should be less than or equal to 1"),
    "mode without a value": (["evaluate", "--mode", "cascade(alpha)"], "is not of the form NAME(parameter=value"),
    "mode without its parameter": (["evaluate", "--mode", "cascade"], "alpha: missing"),
    "mode with another's parameter": (["evaluate", "--mode", "typical(alpha=1)"], "alpha: unknown key"),
    "mode left open": (["evaluate", "--mode", "cascade(alpha=0.5"], "unknown mode 'cascade(alpha=0.5'"),
    "empty mode": (["evaluate", "--mode", ""], "--mode: unknown mode ''"),
    "learned without an arbiter": (["evaluate", "--mode", "learned"], "'learned' needs a trained arbiter"),
    "threshold too large": (
        evaluate("--mode", "learned(threshold=5)"),
        "threshold must be a number from 0 to 1, got 5",
    ),
    "threshold a text": (
        evaluate("--mode", 'learned(threshold="a")'),
        "threshold must be a number from 0 to 1, got 'a'",
    ),
    "threshold a list": (
        evaluate("--mode", "learned(threshold=[1])"),
        "threshold must be a number from 0 to 1, got [1]",
    ),
    "threshold true": (
        evaluate("--mode", "learned(threshold=true)"),
        "threshold must be a number from 0 to 1, got True",
    ),
    "parameter of learned": (
        evaluate("--mode", "learned(alpha=1)"),
        "learned has no parameter 'alpha'",
    ),
    "arbiter nowhere": (["evaluate", "--mode", "learned", "--artefact", "x"], "x: no arbiter here"),
    "record without an arbiter": (["evaluate", "--mode", "strict", "--record", "x"], "--record: needs the artefact"),
    "result that cannot be written": (evaluate("--mode", "strict", "--json", "/dev/null/x/y"), "/dev/null/x"),
    "answers that cannot be written": (evaluate("--mode", "strict", "--per-question", "/dev/null/x/y"), "/dev/null/x"),
    "demo that cannot be written": (["demo", "--json", "/dev/null/x/y"], "/dev/null/x"),
    "output a file": (["train", "--config", "run.toml", "--output", "run.toml"], "run.toml"),
    "target nowhere": (["train", "--config", "nowhere.toml", "--output", "x"], "pair.target: no model at"),
    "unknown reward": (["train", "--config", "reward.toml", "--output", "x"], "unknown reward 'nice'"),
    "unknown task": (["train", "--config", "task.toml", "--output", "x"], "task: unknown task 'nice'"),
    "unknown advantage": (["train", "--config", "learner.toml", "--output", "x"], "learner.advantage: unknown 'gae'"),
    "broken problems": (["train", "--config", "jsonl.toml", "--output", "x"], "p.jsonl, line 2: not valid JSON"),
    "no option": (["train", "--output", "x"], "Missing option '--config'"),
    "no output": (["train", "--config", "run.toml"], "--output: missing; name a directory for the run, or pass --plan"),
    "plan of nothing": (["train", "--plan", "--config", "nosuch"], "nosuch: cannot be read"),
    "too few problems": (["evaluate", "--mode", "strict", "--problems", "0"], "Invalid value for '--problems'"),
    "no such port": (["demo", "--port", "99999"], "Invalid value for '--port'"),
    "no such command": (["nosuch"], "No such command 'nosuch'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_sentence(
    cospec: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "run.toml").write_text(BUNDLED)
    (tmp_path / "nowhere.toml").write_text(PAIR.format(target="./nowhere"))
    (tmp_path / "reward.toml").write_text(BUNDLED + '[task]\nreward = "nice"\n')
    (tmp_path / "task.toml").write_text(BUNDLED + '[task]\nname = "nice"\n')
    (tmp_path / "learner.toml").write_text(BUNDLED + '[learner]\nadvantage = "gae"\n')
    (tmp_path / "jsonl.toml").write_text(BUNDLED + '[task]\nname = "jsonl"\noptions = { path = "./p.jsonl" }\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n{"prompt": "2+\n')
    code, out, err = cospec(*arguments)
    assert code in (1, 2)
    assert not out
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if code == 1:  # ours; those of 2 are the parser's, in a box
        assert err.startswith("cospec: ")
        assert err.count("\n") == 1


def test_a_plugin_that_vllm_is_told_to_leave_out_is_said_by_doctor_and_demo(
    cospec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = cospec("doctor", "--json")
    report = json.loads(out)
    assert (code, report["ok"], report["problems"]) == (0, True, [])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    code, out, _ = cospec("doctor", "--json")
    report = json.loads(out)
    (problem,) = report["problems"]
    assert (code, report["ok"], report["plugin_loaded"]) == (1, False, False)
    assert problem.startswith("VLLM_PLUGINS: 'other' leaves out 'cospec'")
    assert cospec("demo") == (1, "", f"cospec: {problem}\n")


def test_every_command_explains_itself_at_80_columns(
    cospec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    names = sorted(commands)
    assert names == ["calibrate", "demo", "doctor", "evaluate", "inspect", "train"]
    monkeypatch.setenv("COLUMNS", "80")
    for name in names:
        code, out, _ = cospec(name, "--help")
        assert code == 0
        assert f"Usage: cospec {name}" in out
        assert max(map(len, out.splitlines())) <= 80
        options = [option for parameter in commands[name].params for option in parameter.opts if option[0] == "-"]
        assert [option for option in options if option not in out] == []


def test_inspect_shows_an_arbiter_whole_at_80_columns(
    cospec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = cospec("inspect", ARBITER)
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert {"threshold", "difference", "to target"} <= {
        cell.strip() for line in out.splitlines() for cell in line.split("  ")
    }
    assert code == 0
    for word in ("16 - 32 - 32 - 1", "threshold", "demo/target", "calibration on 1000 problems"):
        assert word in out
    _, out, _ = cospec("inspect", ARBITER, "--json")
    assert json.loads(out)["provenance"]["target"] == "demo/target"


def test_a_port_that_is_taken_is_one_sentence(cospec: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = cospec("demo", "--serve", "--port", str(port))
    assert code == 1
    assert err == f"cospec: port {port}: Address already in use; choose another one\n"


def test_a_disk_that_is_full_is_one_sentence(
    cospec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "run.toml").write_text(BUNDLED)
    monkeypatch.setattr(commands.Trainer, "run", lambda self: None)
    monkeypatch.setattr(commands, "save_uncalibrated", full)  # after the last update
    code, _, err = cospec("train", "--config", "run.toml", "--output", "x")
    assert code == 1
    assert (
        err == "cospec: x: [Errno 28] No space left on device; the last checkpoint is intact, continue with --resume\n"
    )


@pytest.mark.parametrize("same", [True, False])
def test_a_finished_run_that_is_resumed_keeps_its_curve_until_there_is_another(
    same: bool, cospec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calibration may be interrupted; what it shipped is worth more than the same weights without a curve."""
    (tmp_path / "run.toml").write_text(BUNDLED)
    artefact = tmp_path / "x" / "arbiter"
    arbiter, before = load_artefact(Path(ARBITER))
    if not same:
        arbiter = Arbiter(before.hidden_sizes)
    monkeypatch.setattr(commands.Trainer, "run", lambda self: shutil.copytree(ARBITER, artefact))
    monkeypatch.setattr(commands.Trainer, "shipped", lambda self: (3, arbiter))
    monkeypatch.setattr(commands, "plot_learning", lambda output: None)
    found = []
    monkeypatch.setattr(commands, "calibrate_artefact", lambda place, *_: found.append(load_artefact(place)))
    code, _, err = cospec("train", "--config", "run.toml", "--output", "x")
    assert code == 0, err
    ((weights, config),) = found
    assert commands.holds(artefact, arbiter)
    assert weights.hidden_sizes == arbiter.hidden_sizes
    assert bool(config.calibration) == same
    assert (config == before) == same


def test_a_run_that_is_stopped_says_how_to_go_on(
    cospec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(self: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "run.toml").write_text("iterations = 9\n" + BUNDLED)
    monkeypatch.setattr(commands.Trainer, "run", pressed)
    code, _, err = cospec("train", "--config", "run.toml", "--output", "x")
    assert code == 130
    assert err == "cospec: stopped after update 0 of 9; continue with --resume (checkpoints are in x)\n"


def test_a_plan_is_shown_and_nothing_is_written(cospec: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(BUNDLED)
    before = sorted(tmp_path.iterdir())
    code, out, _ = cospec("train", "--plan", "--config", "run.toml")
    assert code == 0
    assert "calibration" in out
    assert "made up as they are needed" in out
    assert sorted(tmp_path.iterdir()) == before
