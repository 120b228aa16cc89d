"""The trainer's bookkeeping, without engines; with them: tests/engine/test_training.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_cospec.errors import ConfigError
from vllm_cospec.server import interruptible
from vllm_cospec.training.config import LearnerConfig, RolloutConfig, TrainConfig, load_train_config
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.tasks import split_of
from vllm_cospec.training.trainer import Trainer, interrupts_held_back

DEMO = load_train_config(Path(__file__).parents[3] / "training" / "configs" / "demo.toml")


def config(**changes: object) -> TrainConfig:
    small = {
        "iterations": 8,
        "rollout": RolloutConfig(prompts_per_iteration=10, prompts_per_unit=4, max_staleness=2, max_tokens=80),
        "learner": LearnerConfig(warm_start_iterations=2, minibatch_size=8),
    }
    return DEMO.model_copy(update={**small, **changes})


def episodes(iteration: int, count: int = 40) -> Episodes:
    generator = np.random.default_rng(iteration)
    every, steps = np.arange(count), np.full(count, 5)
    better = generator.choice([0.0, 1.0], count)
    return Episodes(
        every, better, 2 * steps, steps, np.zeros(count, bool), [""] * count, every,
        generator.normal(size=(count, 16)).astype(np.float32), better > 0, np.full(count, 0.3), every, every,
        better, 1 - better, drafts=10, accepted=20, generated_tokens=400, generating_s=1.0, busy_s=1.1,
    )  # fmt: skip


def advance(trainer: Trainer, until: int) -> None:
    for iteration in range(trainer._version, until):
        trainer._learn(iteration, episodes(iteration))
        trainer._count(episodes(iteration), 1.0)
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
def test_a_run_restored_from_a_checkpoint_ends_with_the_same_state(tmp_path: Path, stop: int) -> None:
    straight = Trainer(config(), tmp_path / "straight", resume=False)
    advance(straight, 8)
    advance(Trainer(config(), tmp_path / "broken", resume=False), stop)
    resumed = Trainer(config(), tmp_path / "broken", resume=True)
    assert resumed._version == stop
    advance(resumed, 8)
    assert resumed.finished
    assert resumed.totals == straight.totals
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
    assert np.isnan(trainer._summary(Episodes.merge([]))["accuracy"])


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
