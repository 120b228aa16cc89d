"""What the benchmarks compute without an engine: shares of problems, tallies of rounds, grids of rules."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import typer.main
from scripts import ROOT, benchmark
from typer.testing import CliRunner

from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import policy_names
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.modes import parse_mode
from vllm_cospec.training.measure.outcome import Outcome

pareto, rounds, setup, sweep, throughput = map(benchmark, ("pareto", "rounds", "setup", "sweep", "throughput"))


def row(accuracy: float, acceptance_length: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "acceptance_length": acceptance_length}


@pytest.mark.parametrize("k", [1, 2, 7])
def test_every_rule_has_settings_and_each_is_one(k: int) -> None:
    grid = pareto.grid(k)
    assert {family for family, settings in grid.items() if settings or k == 1} == set(policy_names()) - {
        "strict", "learned", "random",
    }  # fmt: skip
    for family, settings in grid.items():
        for setting in settings:
            assert parse_mode(setting).policy.policy == family


def test_a_setting_is_beaten_by_more_accuracy_at_no_shorter_an_acceptance_length() -> None:
    rows = {
        "target": row(0.9, 9.0),
        "learned": row(0.7, 5.0),
        "learned(threshold=0.2)": row(0.6, 6.0),
        "shorter and worse": row(0.5, 4.0),
        "as long and worse": row(0.5, 6.0),
        "longer": row(0.5, 6.1),
        "as accurate": row(0.7, 3.0),
        "target, sampled": row(0.1, 1.0),
    }
    assert pareto.beaten_by(rows) == {
        "shorter and worse": "learned",
        "as long and worse": "learned(threshold=0.2)",
        "longer": None,
        "as accurate": None,
    }


def test_rows_are_grouped_by_policy_without_the_target() -> None:
    names = ["target", "target, sampled", "strict", "kl(max_kl=1.0)", "kl(max_kl=2.0)"]
    grouped = pareto.families({name: {"mode": name} for name in names})
    assert {family: [row["mode"] for row in own] for family, own in grouped.items()} == {
        "strict": ["strict"], "kl": names[3:],
    }  # fmt: skip


def test_the_shares_of_the_rounds_are_all_problems_once() -> None:
    assert [list(throughput.share(7, number, 3)) for number in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [list(throughput.share(7, number, 1)) for number in range(3)] == [list(range(7))] * 3


def test_a_server_is_started_with_neutral_sampling_but_for_what_was_asked_for() -> None:
    def override(options: dict[str, Any]) -> dict[str, Any]:
        flags = setup.server_arguments(options)
        assert flags.count("--override-generation-config") == 1
        return json.loads(flags[flags.index("--override-generation-config") + 1])

    assert override({"max_model_len": 9}) == {
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "min_p": 0.0, "max_new_tokens": None,
    }  # fmt: skip
    given = override({"override_generation_config": {"top_p": 0.5}})
    assert (given["top_p"], given["min_p"]) == (0.5, 0.0)


def outcome(problems: list[int], scores: list[float], seconds: float) -> Outcome:
    n = len(problems)
    return Outcome(
        np.array(problems), np.array(scores), np.full(n, 10), np.zeros(n, bool), Counts(), seconds, [[0.1, 0.2]] * n
    )


def test_rounds_that_share_the_problems_and_rounds_that_repeat_them_add_up() -> None:
    own = {
        "target": [outcome([0], [0.0], 2.0), outcome([1], [1.0], 1.0)],
        "learned": [outcome([0, 1], [1.0, 1.0], 2.0), outcome([0, 1], [0.0, 0.0], 1.0)],  # counts as answered first
        "standard": [],
    }
    first, second = rounds.rows(own)
    assert (first["num_problems"], first["accuracy"], first["rounds_tokens_per_s"]) == (2, 0.5, [5.0, 10.0])
    assert (second["num_problems"], second["accuracy"], second["rounds_tokens_per_s"]) == (2, 1.0, [10.0, 20.0])
    paired = second["paired_vs_target"]
    assert (paired["gained"], paired["lost"], paired["p_value"]) == (1, 0, 1.0)
    assert rounds.ratios(own) == ["learned / target: 2.00 (2.00 to 2.00 in 2 rounds) tokens per second"]
    assert rounds.finished(own) == 0


def test_a_sweep_names_the_fastest_k_of_each_load_and_mode() -> None:
    rows = [
        row
        for in_flight, k, seconds in ((1, 4, (2.0, 2.0)), (1, 8, (1.0, 4.0)), (4, 4, (1.0, 1.0)), (4, 8, (2.0, 8.0)))
        for row in sweep.rows_of(
            {
                "target": [outcome([0], [1.0], 4.0), outcome([0], [1.0], 8.0)],  # the machine became slower
                "learned": [outcome([0], [1.0], seconds[0]), outcome([0], [1.0], seconds[1])],
            },
            k, in_flight,
        )
    ]  # fmt: skip
    assert [row["times_target"] for row in rows] == [1, 3.0, 1, 3.0, 1, 6.0, 1, 1.5]
    assert rows[3]["rounds_times_target"] == [4.0, 2.0]
    found = [(row["concurrency"], row["mode"], row["num_speculative_tokens"]) for row in sweep.best(rows)]
    assert found == [(1, "learned", 4), (4, "learned", 4)]  # of two that are alike the smaller
    shown = sweep.table(rows)
    assert shown.row_count == len(rows)
    assert sum("*" in str(cell) for cell in shown.columns[3].cells) == 2


@pytest.mark.parametrize("text", ["", "4,", "0", "4;8", "-1", "many"])
def test_what_is_no_list_of_numbers_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--k: {text!r} is no list of whole numbers from 1 on"):
        sweep.numbers(text, "--k")
    assert sweep.numbers("8, 4,8", "--k") == [4, 8]


@pytest.mark.parametrize(
    "name", ["throughput", "pareto", "agreement", "strict_cost", "learning_curves", "kernel", "sparse", "sweep"]
)
def test_help_names_every_option_whole_at_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    app = benchmark("command").application(benchmark(name).main)
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert max(map(len, shown.splitlines())) <= 80
    options = [option for parameter in typer.main.get_command(app).params for option in parameter.opts]
    assert options
    assert [option for option in options if option not in shown] == []


@pytest.mark.parametrize("command", [["benchmarks/learning_curves.py"], ["-m", "benchmarks.learning_curves"]])
def test_a_command_runs_as_a_file_and_as_a_module_and_its_errors_are_sentences(command: list[str]) -> None:
    arguments = ["run=/nowhere", "--plot", "/nowhere/plot.png"]
    done = subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert "RUNS: 'run=/nowhere': no metrics.jsonl there" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
