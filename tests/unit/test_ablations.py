"""The ablations leave out what they say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, benchmark

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.statistics import INDEX, NAMES, NUM_STATISTICS
from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import TrainConfig, load_train_config

ablations, rows = benchmark("ablations"), benchmark("ablation_rows")
Row = rows.AblationRow


@pytest.fixture(scope="module")
def demo() -> TrainConfig:
    return load_train_config(DEMO_CONFIG)


def labels(count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Statistics, and labels that depend on two of them."""
    x = np.random.default_rng(3).standard_normal((count, NUM_STATISTICS)).astype(np.float32)
    score = 2 * x[:, INDEX["target_logprob_draft"]] - x[:, INDEX["output_position"]] + 0.5
    worth = np.where(score + np.random.default_rng(4).logistic(size=count) > 0, 1.0, -1.0)
    worth[::7] = 0.0  # not telling
    return x, worth


def trained(mean: float = 0.0) -> dict[str, torch.Tensor]:
    arbiter = Arbiter((32, 32))
    arbiter.mean.fill_(mean)
    arbiter.scale.fill_(2.0)
    return arbiter.state_dict()


def score(weights: dict[str, torch.Tensor], statistics: np.ndarray) -> torch.Tensor:
    arbiter = Arbiter((32, 32))
    arbiter.load_state_dict(weights)
    with torch.no_grad():
        return arbiter.logit(torch.from_numpy(statistics))


def test_each_statistic_is_in_one_group() -> None:
    assert sorted(name for names in ablations.GROUPS.values() for name in names) == sorted(NAMES)


def test_a_statistic_that_is_left_out_changes_nothing(demo: TrainConfig) -> None:
    x, worth = labels()
    names = ablations.GROUPS["target"]
    weights = ablations.warm_start(demo, trained(), x, worth, without=names)
    other = x.copy()
    other[:, [INDEX[name] for name in names]] = 50.0
    assert torch.equal(score(weights, x), score(weights, other))
    assert not torch.equal(score(weights, x), score(ablations.warm_start(demo, trained(), x, worth), x))


def test_only_what_is_left_out_loses_its_scale() -> None:
    mean, scale = ablations.standardised(trained(1.5), ("kl_draft_target",))
    assert scale[INDEX["kl_draft_target"]] == torch.tensor(ablations.NO_SCALE)
    assert (scale == 2.0).sum() == NUM_STATISTICS - 1
    assert (mean == 1.5).all()


def test_the_network_of_logistic_regression_is_linear_and_at_the_optimum(demo: TrainConfig) -> None:
    x, worth = labels()
    weights = ablations.logistic(demo, trained(mean=0.3), x, worth)
    one, two = x[:200], x[200:400]
    # a linear score: that of a mean is the mean of the scores
    torch.testing.assert_close(
        score(weights, (one + two) / 2), (score(weights, one) + score(weights, two)) / 2, atol=1e-4, rtol=1e-4
    )
    known = worth != 0
    error = torch.sigmoid(score(weights, x[known])) - torch.from_numpy((worth[known] > 0).astype(np.float32))
    gradient = (torch.from_numpy(x[known]) * error[:, None]).mean(0)
    assert gradient.abs().max() < 1e-3
    assert error.mean().abs() < 1e-3


def test_changed_settings_are_checked_and_the_others_stay(demo: TrainConfig) -> None:
    found = ablations.changed(demo, {"rollout": {"temperature": 0.7}}, seed=3)
    assert found.rollout.temperature == 0.7
    assert found.seed == 3
    assert found.rollout.max_tokens == demo.rollout.max_tokens
    with pytest.raises(ValueError, match="temperature"):
        ablations.changed(demo, {"rollout": {"temperature": 7.0}})


def test_what_is_fitted_again_is_served_as_it_was_trained_only(demo: TrainConfig) -> None:
    both = ablations.kinds_of(demo)[0]
    assert [(row.temperature, row.num_speculative_tokens) for row in ablations.rows_wanted(both, both.name, 2)] == [
        (0.0, 7), (0.7, 7),
    ]  # fmt: skip
    assert [
        (row.temperature, row.num_speculative_tokens) for row in ablations.rows_wanted(both, "without draft", 2)
    ] == [(0.0, 7)]


def test_fewer_draft_tokens_are_fewer_than_a_configurations_own(demo: TrainConfig) -> None:
    assert [kind.name for kind in ablations.kinds_of(demo)][-1] == "trained with K = 4"
    few = ablations.changed(demo, {"pair": {"num_speculative_tokens": 5}})
    last = ablations.kinds_of(few)[-1]
    assert last.name == "trained with K = 3"
    assert last.changes == {"pair": {"num_speculative_tokens": 3}}
    assert last.served == ((0.0, 5), (0.0, 3))


def test_kinds_are_chosen_by_name(demo: TrainConfig) -> None:
    assert [kind.name for kind in ablations.chosen_kinds(demo, "RL alone; trained at T = 0.7")] == [
        "RL alone", "trained at T = 0.7",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--only: 'labels' is none of warm start and RL; RL alone;"):
        ablations.chosen_kinds(demo, "labels")


def test_rows_are_kept_and_become_a_table(tmp_path: Path) -> None:
    rule = Row("cascade", 0, 0.0, 7, None, 5.0, 0.3, "0" * 10 + "1" * 30)
    for row in (
        rule,
        Row("a", 2, 0.0, 7, 0.4, 5.5, 0.3, "1" * 40),
        Row("a", 1, 0.0, 7, 0.5, 5.25, 0.3, "1" * 20 + "0" * 20),
        Row("a", 1, 0.7, 7, 0.5, 5.25, 0.3, "1" * 40),
    ):
        rows.save_row(tmp_path, row)
    saved = rows.saved_rows(tmp_path)
    assert len(saved) == 4
    assert rows.from_result({"rows": [row.as_json() for row in saved]}) == saved
    lines = rows.markdown(saved, "cascade").splitlines()
    assert lines[3].startswith("| a | T = 0, K = 7 | 50.0, 100.0 | 75.0 % | 5.38 | 0.5, 0.4 | ")
    assert lines[3].endswith(" | -25.0, +25.0 |")
    assert rows.paired(saved[2], rule).startswith("+25.0 (")
    assert rows.paired(saved[2], rule).endswith("), +10 -0, p = 0.002")
    assert rows.paired(saved[0], rule).endswith("), +10 -20, p = 0.1")
    assert lines[4] == "| a | T = 0.7, K = 7 | 100.0 | 100.0 % | 5.25 | 0.5 |  |"
    assert lines[2] == "| `cascade` | T = 0, K = 7 | 75.0 | 75.0 % | 5.00 |  |  |"


def test_the_table_in_the_documentation_is_that_of_the_result_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "ablations.json").read_text())
    table = rows.markdown(rows.from_result(result), result["rule"])
    assert table in (ROOT / "docs" / "training.md").read_text()
