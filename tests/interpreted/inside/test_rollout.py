"""Rollouts on Model Runner V2, its Triton kernels interpreted: weights pushed in memory, actions sampled, branches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import in_a_fork

from vllm_cospec.arbiter import Arbiter, save_artefact
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.training.artefact import artefact_config
from vllm_cospec.training.config import LearnerConfig, PairConfig, RolloutConfig, TrainConfig, bundled
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.measure.modes import parse_mode
from vllm_cospec.training.rollout.collect import roll_out
from vllm_cospec.training.rollout.engine import Engine, Request
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import load_task
from vllm_cospec.training.tasks.grading import Graders

pytestmark = pytest.mark.engine

CONFIG = TrainConfig(
    pair=PairConfig(
        target=str(bundled("target")), draft=str(bundled("draft")), num_speculative_tokens=3,
        engine={"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**25,
                "enforce_eager": True},
    ),
    # the prompt's token and four whole blocks: a response that drops a draft before its last token needs a fifth
    rollout=RolloutConfig(max_tokens=17, branches_per_response=1),
    learner=LearnerConfig(hidden_sizes=(8,)),
)  # fmt: skip


def rolled_out(engine: Engine, initial_keep: float) -> Episodes:
    task = load_task("demo")
    problems = tuple(task.problems(seed=4, n=4, split="train"))
    learner = Learner(CONFIG.learner.model_copy(update={"initial_keep": initial_keep}), seed=1, updates=1)
    engine.set_arbiter(learner.weights(), sample_actions=True)
    with Graders(CONFIG.task) as graders:
        return roll_out(engine, Unit(0, 0, problems, 0, seed=2), CONFIG, graders)


def roll_out_on_one_engine(config: TrainConfig) -> dict[str, Any]:
    """Roll out three times on one engine."""
    weights = Learner(config.learner, seed=1, updates=1).weights()
    engine = Engine(config.pair, {"hidden_sizes": (8,), "state_dict": weights})
    sampler = engine._llm.llm_engine.model_executor.driver_worker.worker.cospec
    found = {name: rolled_out(engine, keep) for name, keep in (("some", 0.4), ("always", 1 - 1e-6))}
    engine.set_policy(parse_mode("fly(entropy_threshold=0.3, window=1)").policy)
    prompt = engine.encode(load_task("demo").problems(seed=4, n=1, split="train")[0].prompt)
    rule = engine.run([Request(prompt, 17, seed=1)])[0]
    with tempfile.TemporaryDirectory() as directory:
        save_artefact(Path(directory), Arbiter((8,)), artefact_config(config.pair, (8,)), "Any arbiter.\n")
        engine.set_policy(Learned(artefact=directory))
    found["again"] = rolled_out(engine, 0.4)
    return {**found, "rule": [d.kept for d in rule.decisions], "sampler": type(sampler).__module__}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return in_a_fork(roll_out_on_one_engine, CONFIG)


def test_v2_collects_decisions_of_the_weights_it_was_given(found: dict[str, Any]) -> None:
    assert found["sampler"] == "vllm_cospec.runners.v2"
    some, always = found["some"], found["always"]
    assert len(some.kept) > 3
    assert some.probability == pytest.approx(np.full(len(some.kept), 0.4), abs=1e-5)
    assert np.isfinite(some.statistics).all()
    assert always.kept.all()
    assert always.capped.all()
    assert always.acceptance_length == 4
    assert some.acceptance_length < 4


def test_v2_follows_a_rule_and_an_arbiter_again(found: dict[str, Any]) -> None:
    assert found["rule"]  # was asked; what it then does with the arbiter is the next test's
    assert len(found["again"].kept) == len(found["some"].kept)


def test_v2_branches_take_the_other_road_and_repeat_themselves(found: dict[str, Any]) -> None:
    first, second = found["some"], found["again"]
    # a branch is left out when it does not reproduce the response up to its mismatch, decision included
    assert len(first.branch_decision) >= 3
    for name in ("tokens", "steps", "kept", "output_position", "branch_decision", "branch_keep", "branch_drop"):
        assert (getattr(first, name) == getattr(second, name)).all(), name
    assert torch.equal(torch.from_numpy(first.statistics), torch.from_numpy(second.statistics))
