"""What can be known beforehand is checked before anything starts: models, problems, prompts, gold answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import TrainConfig, require_models
from vllm_cospec.training.learning.advantages import load_advantage
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.tasks import Problem, Split
from vllm_cospec.training.tasks.code_problems import CodeTask
from vllm_cospec.training.tasks.datasets import Records, check_golds
from vllm_cospec.training.tasks.rewards import load_reward

CALIBRATION_SEED = 77  # of the calibration problems; the split is theirs alone
HELD_OUT_SEED = 78  # of the training problems that choose the best checkpoint and are never trained on

Say = Callable[[str], None]


def check_training(config: TrainConfig, say: Say = lambda text: None) -> Problems:
    """Check a run against its models and its problems.

    Args:
        config: of the run.
        say: called with what is left out.

    Returns:
        The problems.

    Raises:
        ConfigError: names the setting, what it needs and what there is.
    """
    require_models(config.pair)
    load_advantage(config.learner.advantage)
    problems = Problems(config.pair, config.task, config.rollout)
    load_reward(config.task.reward, problems.task)
    check_time_limits(config, problems)
    known = [*problems.known("train"), *problems.known("calibration")]
    _say(say, problems.check_lengths(known))
    check_answers(config, problems, known)
    calibration = problems.draw(CALIBRATION_SEED, config.calibration.problems, "calibration", "calibration.problems")
    held_out = held_out_problems(config, problems)
    first = problems.draw(
        config.seed * 1_000_003, config.rollout.prompts_per_iteration, "train", "rollout.prompts_per_iteration",
        {problem.prompt for problem in held_out},
    )  # fmt: skip
    if not known:  # a generator: what it has made up so far says what is to come
        _say(say, problems.check_lengths([*calibration, *held_out, *first]))
    return problems


def calibration_problems(config: TrainConfig, say: Say = lambda text: None) -> list[Problem]:
    """Return the problems thresholds are tried on, checked as before a run.

    Raises:
        ConfigError: names the setting, what it needs and what there is.
    """
    problems = Problems(config.pair, config.task, config.rollout)
    return _checked(config, problems, CALIBRATION_SEED, config.calibration.problems, "calibration",
                    "calibration.problems", say)  # fmt: skip


def test_problems(config: TrainConfig, problems: Problems, seed: int, n: int, split: Split, say: Say) -> list[Problem]:
    """Return the problems of an evaluation.

    Raises:
        ConfigError: names the setting, what it needs and what there is.
    """
    return _checked(config, problems, seed, n, split, "--problems", say)


def _checked(
    config: TrainConfig, problems: Problems, seed: int, n: int, split: Split, where: str, say: Say
) -> list[Problem]:
    require_models(config.pair)
    load_reward(config.task.reward, problems.task)
    check_time_limits(config, problems)
    known = problems.known(split)
    _say(say, problems.check_lengths(known))
    chosen = problems.draw(seed, n, split, where)
    if not known:
        _say(say, problems.check_lengths(chosen))
    check_answers(config, problems, chosen)
    return chosen


def held_out_problems(config: TrainConfig, problems: Problems) -> list[Problem]:
    """Return the training problems that choose the best checkpoint; they are trained on in no iteration."""
    selection = config.selection
    if not selection.every:
        return []
    return problems.draw(HELD_OUT_SEED, selection.problems, "train", "selection.problems")


def check_answers(config: TrainConfig, problems: Problems, questions: Sequence[Problem]) -> None:
    """Check the gold answers where the judge can say beforehand whether it understands them.

    Raises:
        ConfigError: names the line and the way out.
    """
    task = problems.task
    if config.task.reward == "math_verify":
        check_golds(questions)
    elif config.task.reward == "task" and isinstance(task, Records):
        task.check(questions)


def check_time_limits(config: TrainConfig, problems: Problems) -> None:
    """Check that an answer whose code takes too long scores 0, instead of counting as a grader that failed.

    Raises:
        ConfigError: the grader is given less time than the code.
    """
    task, limit = problems.task, config.task.reward_timeout_s
    if isinstance(task, CodeTask) and limit <= task.timeout_s:
        raise ConfigError(
            f"task.reward_timeout_s: {limit:g} leaves no time beside task.options.timeout_s = {task.timeout_s:g}; "
            f"raise the former"
        )


def _say(say: Say, text: str) -> None:
    if text:
        say(text)
