"""Fits to labels are judged by what they say of labels that were not learnt from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scripts import ROOT, benchmark

from vllm_cospec.kernels.statistics import INDEX, NUM_STATISTICS
from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import load_train_config

label_fits, ablations = benchmark("label_fits"), benchmark("ablations")


def labels(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistics, of which one decides."""
    x = np.random.default_rng(3).standard_normal((count, NUM_STATISTICS)).astype(np.float32)
    return x, np.where(x[:, INDEX["draft_entropy"]] > 0, 1.0, -1.0).astype(np.float32)


def test_scores_are_judged_by_hand_worked_labels() -> None:
    logit, truth = torch.tensor([3.0, 0.5, 0.1, -2.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = label_fits.judged(logit, truth)
    assert found["auc"] == 0.75  # of four pairs, 0.1 against 0.5 is the wrong way round
    assert found["right"] == 0.75
    assert found["gain_0.5"] == 25.0  # three kept: two won, one lost
    assert found["gain_0.7"] == 25.0  # 0.95 alone is kept
    likelihood = torch.sigmoid(logit * truth).log().mean()
    assert found["loss"] == pytest.approx(-float(likelihood), rel=1e-6)


def test_the_mean_of_both_distributions_is_judged_unfitted() -> None:
    statistics = torch.zeros(3, NUM_STATISTICS)
    names = ("target_logprob_draft", "draft_logprob_draft", "target_logprob_top", "draft_logprob_target")
    shares = torch.tensor([[0.1, 0.9, 0.5, 0.1], [0.2, 0.5, 0.6, 0.3], [0.3, 0.4, 0.4, 0.2]])
    for column, name in enumerate(names):
        statistics[:, INDEX[name]] = shares[:, column].log()
    lead = label_fits.mean_of_both(statistics, 0.5)
    assert lead.tolist() == pytest.approx([0.2, -0.1, 0.05])
    found = label_fits.unfitted(lead, torch.tensor([1.0, -1.0, -1.0]))
    assert found == pytest.approx({"auc": 1.0, "right": 2 / 3, "gain": 0.0})  # two kept: one won, one lost
    assert label_fits.mean_of_both(statistics, 1.0)[0] == pytest.approx(-0.4)  # the target alone


def test_a_fit_without_the_group_that_decides_is_blind() -> None:
    demo = load_train_config(DEMO_CONFIG)
    x, truth = labels(6000)
    fits = label_fits.fits(demo, x, truth, seed=1)
    assert list(fits) == [
        "network on all statistics", "logistic regression", *(f"network without {group}" for group in ablations.GROUPS),
    ]  # fmt: skip
    auc = {}
    for name in ("network on all statistics", "logistic regression", "network without draft", "network without target"):
        logit = label_fits.scored(fits[name](), demo.learner.hidden_sizes, torch.from_numpy(x))
        auc[name] = label_fits.judged(logit, torch.from_numpy(truth))["auc"]
    blind = auc.pop("network without draft")
    assert min(auc.values()) > 0.95
    assert blind < 0.7


def test_another_seed_learns_from_other_labels() -> None:
    demo = load_train_config(DEMO_CONFIG)
    x, truth = labels(400)
    one, two, again = (label_fits.fits(demo, x, truth, seed)["logistic regression"]() for seed in (1, 2, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["mean"], two["mean"])


def test_each_part_is_judged_by_what_was_fitted_to_the_others() -> None:
    given = torch.arange(7.0)[:, None], torch.arange(7.0)
    found = list(label_fits.partitions(given, None, 3))
    assert torch.equal(torch.cat([judge[1] for _, judge in found]), given[1])
    for own, judge in found:
        assert sorted([*own[1].tolist(), *judge[1].tolist()]) == given[1].tolist()
        assert torch.equal(judge[1], torch.arange(judge[1][0].item(), judge[1][-1].item() + 1))  # whole windows
        assert torch.equal(own[0][:, 0], own[1])
    other = torch.ones(2, 1), torch.ones(2)
    assert [judge is other and own is given for own, judge in label_fits.partitions(given, other, 2)] == [True, True]


def test_the_table_has_means_and_their_range() -> None:
    figures = {"auc": 0.8, "loss": 0.5, "right": 0.75, "gain_0.5": 20.0, "gain_0.7": 10.0}
    table = label_fits.markdown({"fits": {"a": [figures, {**figures, "auc": 0.9}]}}).splitlines()
    assert table[2] == "| a | 0.850 (0.800 to 0.900) | 0.500 | 75.0 % | +20.0 | +10.0 |"


def test_the_table_in_the_documentation_is_that_of_the_result_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "code_label_fits.json").read_text())
    assert label_fits.markdown(result) in (ROOT / "benchmarks" / "code" / "README.md").read_text()
