"""What the benchmarks compute without an engine: shares of problems, tallies of rounds, grids of rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
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

NAMES = ("load", "pareto", "rounds", "setup", "sweep", "throughput")
load, pareto, rounds, setup, sweep, throughput = map(benchmark, NAMES)


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
    assert "times_standard" not in rows[0]  # nobody asked for it
    shown = sweep.table(rows)
    assert shown.row_count == len(rows)
    assert sum("*" in str(cell) for cell in shown.columns[3].cells) == 2


def test_the_speed_of_a_mode_is_compared_with_target_and_standard_within_rounds() -> None:
    own = {
        "target": [outcome([0], [1.0], 4.0), outcome([1], [1.0], 8.0)],
        "standard": [outcome([0], [1.0], 2.0), outcome([1], [1.0], 4.0)],
        "learned": [outcome([0], [1.0], 1.0), outcome([1], [1.0], 2.0)],
    }
    learned = sweep.rows_of(own, 4, 1)[2]
    assert (learned["rounds_times_target"], learned["rounds_times_standard"]) == ([4.0, 4.0], [2.0, 2.0])
    assert learned["times_standard_mean_ci95"] == pytest.approx([2.0, 2.0])


def test_the_interval_of_a_mean_quotient_is_students() -> None:
    low, high = rounds.mean_quotient([1.0, 2.0, 4.0])
    half = 4.302653 * np.log(2) / np.sqrt(3)  # t of two degrees of freedom; the logarithms are log 2 apart
    assert (low, high) == pytest.approx((2 * np.exp(-half), 2 * np.exp(half)))
    assert rounds.mean_quotient([2.0]) is None


def test_a_sweep_in_parts_keeps_what_its_file_has_of_other_k_and_loads(tmp_path: Path) -> None:
    def place(k: int, in_flight: int, run: str) -> dict[str, Any]:
        return {"concurrency": in_flight, "num_speculative_tokens": k, "run": run}

    path, about = tmp_path / "sweep.json", {"task": "demo", "modes": ["target", "learned"]}
    assert sweep.earlier_rows(path, about) == []
    path.write_text(json.dumps({"about": about, "rows": [place(4, 1, "first"), place(4, 16, "first")]}))
    found = sweep.merged(sweep.earlier_rows(path, about), [place(8, 1, "second"), place(4, 16, "second")])
    assert found == [place(4, 1, "first"), place(8, 1, "second"), place(4, 16, "second")]
    with pytest.raises(ConfigError, match=r"^--json: .* holds a sweep with other modes; choose another file"):
        sweep.earlier_rows(path, {**about, "modes": ["target"]})


def test_servers_warm_up_on_prompts_that_leave_no_prefix_of_the_asked_ones_cached() -> None:
    asked = setup.set_up(None, {}, "demo", None, 20, 1, None)
    warm = throughput.warm_up_prompts(asked)
    assert [prompt[::-1] for prompt in warm] == asked.prompts[:16]
    loads = [load.Load(48, 0.0, 1), load.Load(48, 0.0, 12)]
    assert throughput.warm_up_load(loads) == load.Load(8, 0.0, 12)


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


def test_a_step_of_both_samplers_on_the_cpu_is_timed() -> None:
    row = benchmark("verification").compare(100, 3, 4, 0.7, rounds=1)
    assert (row["vocab"], row["batch"], row["num_draft_tokens"]) == (100, 3, 4)
    assert row["ratio"] == row["ours_ms"] / row["stock_ms"]
    assert min(row["ours_ms"], row["stock_ms"], row["floor_ms"]) > 0


@pytest.mark.parametrize("command", [["benchmarks/learning_curves.py"], ["-m", "benchmarks.learning_curves"]])
def test_a_command_runs_as_a_file_and_as_a_module_and_its_errors_are_sentences(command: list[str]) -> None:
    arguments = ["run=/nowhere", "--plot", "/nowhere/plot.png"]
    done = subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert "RUNS: 'run=/nowhere': no metrics.jsonl there" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
