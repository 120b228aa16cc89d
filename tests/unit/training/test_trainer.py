"""The trainer's bookkeeping, without engines; with them: tests/engine/test_training.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_cospec.errors import ConfigError, TrainingError
from vllm_cospec.server import interruptible, interrupts_held_back
from vllm_cospec.training.config import (
    CalibrationConfig,
    LearnerConfig,
    RolloutConfig,
    SelectionConfig,
    TaskConfig,
    TrainConfig,
    load_train_config,
)
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.in_process import InProcess
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import split_of
from vllm_cospec.training.trainer import Trainer

DEMO = load_train_config(Path(__file__).parents[3] / "training" / "configs" / "demo.toml")


def config(**changes: object) -> TrainConfig:
    small = {
        "iterations": 8,
        "rollout": RolloutConfig(prompts_per_iteration=10, prompts_per_unit=4, max_staleness=2, max_tokens=80),
        "learner": LearnerConfig(warm_start_iterations=2, minibatch_size=8),
        "selection": SelectionConfig(every=0),
        "calibration": CalibrationConfig(problems=20),
    }
    return DEMO.model_copy(update={**small, **changes})


def episodes(iteration: int, count: int = 40) -> Episodes:
    generator = np.random.default_rng(iteration)
    every, steps = np.arange(count), np.full(count, 5)
    better = generator.choice([0.0, 1.0], count)
    return Episodes(
        every, better, 2 * steps, steps, np.zeros(count, bool), [""] * count, every,
        generator.normal(size=(count, 16)).astype(np.float32), better > 0, np.full(count, 0.3), every, every,
        np.ones(count), better, 1 - better, np.full(count, 0.5), np.full(count, 0.4), generated_tokens=400,
        generating_s=1.0, busy_s=1.1,
    )  # fmt: skip


def advance(trainer: Trainer, until: int) -> None:
    for iteration in range(trainer._version, until):
        trainer._learn(iteration, episodes(iteration))
        trainer.tally.count(episodes(iteration), 1.0)
        trainer._save()


def test_rollouts_lag_no_more_than_allowed_and_never_behind_the_warm_start(tmp_path: Path) -> None:
    trainer = Trainer(config(), tmp_path / "run", resume=False)
    assert [trainer.version_for(i) for i in range(8)] == [0, 0, 2, 2, 2, 3, 4, 5]


def test_an_iterations_work_is_always_the_same_and_of_the_training_split(tmp_path: Path) -> None:
    trainer = Trainer(config(), tmp_path / "run", resume=False)
    units = trainer.units(3)
    assert units == trainer.units(3)
    assert [len(unit.problems) for unit in units] == [4, 4, 2]
    assert [unit.first_problem for unit in units] == [0, 4, 8]
    assert len({unit.key for i in range(4) for unit in trainer.units(i)}) == 12
    assert all(split_of(problem.prompt) == "train" for unit in units for problem in unit.problems)
    assert units[0].problems != trainer.units(4)[0].problems


@pytest.mark.parametrize("stop", [1, 2, 3, 6])
@pytest.mark.parametrize("objective", ["policy_gradient", "labels"])
def test_a_run_restored_from_a_checkpoint_ends_with_the_same_state(tmp_path: Path, stop: int, objective: str) -> None:
    changed = LearnerConfig(warm_start_iterations=2, minibatch_size=8, objective=objective, weight_decay=0.1)  # type: ignore[arg-type]
    settings = config(learner=changed)
    straight = Trainer(settings, tmp_path / "straight", resume=False)
    advance(straight, 8)
    assert sum(len(worth) for _, worth in straight._branches) == (8 * 40 if objective == "labels" else 0)
    advance(Trainer(settings, tmp_path / "broken", resume=False), stop)
    resumed = Trainer(settings, tmp_path / "broken", resume=True)
    assert resumed._version == stop
    advance(resumed, 8)
    assert resumed.finished
    assert resumed.tally.totals == straight.tally.totals
    assert all(torch.equal(t, resumed.learner.state()[name]) for name, t in straight.learner.state().items())
    assert resumed._history.keys() == straight._history.keys()


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    advance(Trainer(config(), tmp_path / "run", resume=False), 3)
    with pytest.raises(ConfigError, match=r"--resume: seed was 1 when the run began and is 2 now"):
        Trainer(config(seed=2), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"--resume: learner.clip was 0.2"):
        Trainer(
            config(learner=LearnerConfig(warm_start_iterations=2, minibatch_size=8, clip=0.1)), tmp_path / "run", True
        )
    more_actors = RolloutConfig(
        actors=9, attempts=7, prompts_per_iteration=10, prompts_per_unit=4, max_staleness=2, max_tokens=80
    )
    assert Trainer(config(rollout=more_actors), tmp_path / "run", resume=True)._version == 3


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; pass --resume"):
        Trainer(config(), tmp_path, resume=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_iteration_without_any_episode_changes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(config(), tmp_path / "run", resume=False)
    advance(trainer, 3)
    before = trainer.learner.weights()
    trainer._learn(3, Episodes.merge([]))
    assert all(torch.equal(before[name], t) for name, t in trainer.learner.weights().items())
    assert np.isnan(trainer.tally.figures(Episodes.merge([]))["accuracy"])


def test_the_way_out_of_an_error_may_be_taken_when_a_run_goes_on(tmp_path: Path) -> None:
    """The message of a loss that is not finite says: lower the learning rate and continue. So that must be allowed."""
    advance(Trainer(config(), tmp_path / "run", resume=False), 3)
    slower = config(learner=LearnerConfig(warm_start_iterations=2, minibatch_size=8, learning_rate=1e-4))
    slower = slower.model_copy(update={"task": DEMO.task.model_copy(update={"reward_timeout_s": 60.0})})
    resumed = Trainer(slower, tmp_path / "run", resume=True)
    assert resumed.updates == 3
    advance(resumed, 4)
    assert [group["lr"] for group in resumed.learner._optimizer.param_groups] == pytest.approx([1e-4], rel=0.2)


def test_ctrl_c_waits_for_an_update_that_was_begun() -> None:
    done = []

    def press(then: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append(then)

    with interruptible():  # whatever the tests were started by
        with pytest.raises(KeyboardInterrupt), interrupts_held_back():
            press("saved")
        with pytest.raises(KeyboardInterrupt):  # and it works again afterwards
            press("not reached")
    assert done == ["saved"]


def test_a_target_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    nowhere = DEMO.pair.model_copy(update={"target": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"pair.target: no model at .*nowhere"):
        Trainer(config(pair=nowhere), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_iterations_and_calibration_may_be_changed_when_a_run_goes_on(tmp_path: Path) -> None:
    advance(Trainer(config(), tmp_path / "run", resume=False), 3)
    longer = config(iterations=12, calibration=CalibrationConfig(problems=50))
    assert Trainer(longer, tmp_path / "run", resume=True).updates == 3
    with pytest.raises(ConfigError, match="iterations is 2, and 3 updates have been taken; it may only be raised"):
        Trainer(config(iterations=2), tmp_path / "run", resume=True)


def jsonl_run(path: Path, count: int, start: int = 0) -> TrainConfig:
    lines = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config(task=TaskConfig(name="jsonl", options={"path": str(path)}))


def test_a_run_goes_on_with_its_own_data_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    advance(Trainer(jsonl_run(path, 900), tmp_path / "run", resume=False), 2)
    assert Trainer(jsonl_run(path, 900), tmp_path / "run", resume=True).updates == 2
    with pytest.raises(ConfigError, match=r"--resume: what task.options.path names has changed since the run began"):
        Trainer(jsonl_run(path, 900, start=1), tmp_path / "run", resume=True)


def test_a_run_goes_on_with_its_own_models_and_reward_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    shutil.copytree(DEMO.pair.target, target)
    (tmp_path / "my_reward.py").write_text("def score(problem, text):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = config(pair=DEMO.pair.model_copy(update={"target": str(target)}), task=TaskConfig(reward="my_reward:score"))
    advance(Trainer(own, tmp_path / "run", resume=False), 2)
    (tmp_path / "my_reward.py").write_text("def score(problem, text):\n    return 0.0\n")
    with pytest.raises(ConfigError, match=r"what task.reward names has changed"):
        Trainer(own, tmp_path / "run", resume=True)
    (tmp_path / "my_reward.py").write_text("def score(problem, text):\n    return 1.0\n")
    weights = bytearray((target / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (target / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"what pair.target names has changed"):
        Trainer(own, tmp_path / "run", resume=True)


def test_a_run_goes_on_where_its_models_and_data_lie_elsewhere(tmp_path: Path) -> None:
    """In another checkout, or in a home directory that is mounted at another place."""

    def run_in(home: Path) -> TrainConfig:
        pair = {role: str(home / role) for role in ("target", "draft")} | {"engine": {"tokenizer": str(home / "draft")}}
        options = {"path": str(home / "p.jsonl"), "test_path": str(home / "test.jsonl")}
        task = TaskConfig(name="jsonl", options=options)
        return config(pair=DEMO.pair.model_copy(update=pair), task=task)

    old, new = tmp_path / "old", tmp_path / "new"
    for role in ("target", "draft"):
        shutil.copytree(getattr(DEMO.pair, role), old / role)
    jsonl_run(old / "p.jsonl", 900)
    jsonl_run(old / "test.jsonl", 30, start=2000)
    advance(Trainer(run_in(old), tmp_path / "run", resume=False), 2)
    old.rename(new)
    assert Trainer(run_in(new), tmp_path / "run", resume=True).updates == 2
    (new / "draft" / "config.json").write_text((new / "draft" / "config.json").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"--resume: what pair.draft names has changed since the run began"):
        Trainer(run_in(new), tmp_path / "run", resume=True)
    # a hub id in place of a directory says nothing about what is in it
    named = run_in(new).model_copy(update={"pair": run_in(new).pair.model_copy(update={"draft": "org/draft"})})
    with pytest.raises(ConfigError, match=r"--resume: pair.draft was '.*draft' when the run began and is 'org/draft'"):
        Trainer(named, tmp_path / "run", resume=True)


def test_held_out_problems_are_trained_on_in_no_iteration(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    run = jsonl_run(path, 600).model_copy(update={"selection": SelectionConfig(every=2, problems=400)})
    trainer = Trainer(run, tmp_path / "run", resume=False)
    held_out = {problem.prompt for problem in trainer._held_out}
    assert len(held_out) == 400
    trained = {p.prompt for i in range(40) for unit in trainer.units(i) for p in unit.problems}
    assert len(trained) > 70
    assert not held_out & trained


def held_out_answers(trainer: Trainer, accuracy: dict[int, float]) -> InProcess:
    """Answers to held-out problems, with an accuracy that depends on the update."""

    def work(unit: Unit, weights: object) -> Episodes:
        assert unit.threshold == 0.5
        assert not unit.branches
        found = episodes(0, 100)
        found.reward = (np.arange(100) < 100 * accuracy[trainer.updates]).astype(float)
        return found

    return InProcess(work)


def test_the_best_checkpoint_on_held_out_problems_is_shipped_also_after_a_resumption(tmp_path: Path) -> None:
    run = config(selection=SelectionConfig(every=2, problems=4))
    accuracy = {2: 0.5, 4: 0.8, 6: 0.7, 8: 0.7}
    trainer = Trainer(run, tmp_path / "run", resume=False)
    weights, evaluated = {}, []
    for updates in range(1, 9):
        advance(trainer, updates)
        weights[updates] = trainer.learner.weights()
        if trainer._due():
            trainer._evaluate(held_out_answers(trainer, accuracy))
            trainer._save()
            evaluated.append(updates)
        if updates == 5:
            trainer = Trainer(run, tmp_path / "run", resume=True)
    assert evaluated == [2, 4, 6, 8]
    assert trainer.finished
    for own in (trainer, Trainer(run, tmp_path / "run", resume=True)):
        update, arbiter = own.shipped()
        assert update == 4
        assert all(torch.equal(weights[4][name], tensor) for name, tensor in arbiter.state_dict().items())


def test_a_run_in_which_nothing_is_telling_ends_with_the_counts(tmp_path: Path) -> None:
    flat = episodes(0)
    flat.branch_drop = flat.branch_keep
    trainer = Trainer(config(), tmp_path / "run", resume=False)
    trainer._learn(0, flat)
    with pytest.raises(TrainingError, match="warm start: none of 80 branches changed its answer"):
        trainer._learn(1, flat)
    cold = Trainer(config(learner=LearnerConfig(warm_start_iterations=0)), tmp_path / "cold", resume=False)
    for iteration in range(4):
        cold._learn(iteration, flat)
        cold.tally.count(flat, 1.0)
        if iteration < 3:
            cold._check_telling(iteration, flat)
    with pytest.raises(TrainingError, match=r"none of 160 branches at the mismatches of 160 responses changed"):
        cold._check_telling(3, flat)
