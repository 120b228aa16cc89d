"""Credit: how much better or worse an action was than what the policy would have got on average. Pure functions.

``group``: an episode's return minus the mean return of the other responses to its prompt, for every decision in it.
``branch``: at a mismatch whose two continuations were both rolled out, the return of each minus their mean under the
policy. It says what this one decision was worth, where ``group`` hands the outcome of the whole response to each of its
decisions; it costs a second continuation per decision. Both are this project's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.rollout.episodes import Episodes, saved


@dataclass(frozen=True)
class Samples:
    """What the learner takes: S actions."""

    statistics: np.ndarray  # [S, 16] float32
    keep: np.ndarray  # [S] bool, the action
    probability: np.ndarray  # [S] float64, of that action when it was taken
    advantage: np.ndarray  # [S] float64
    weight: np.ndarray  # [S] float64


Advantage = Callable[[Episodes, float], Samples]

_ADVANTAGES: dict[str, Advantage] = {}


def advantage(name: str) -> Callable[[Advantage], Advantage]:
    """Register a function (episodes, speed_weight) -> samples under ``name``."""

    def register(function: Advantage) -> Advantage:
        _ADVANTAGES[name] = function
        return function

    return register


def load_advantage(name: str) -> Advantage:
    """Return the function registered under ``name``.

    Raises:
        ConfigError: unknown; lists the known ones.
    """
    if name not in _ADVANTAGES:
        raise ConfigError(f"learner.advantage: unknown {name!r}; known are {', '.join(sorted(_ADVANTAGES))}")
    return _ADVANTAGES[name]


def episode_returns(episodes: Episodes, speed_weight: float) -> np.ndarray:
    """Return what each episode is worth: its reward, plus ``speed_weight`` times the share of target steps saved."""
    return episodes.reward + speed_weight * saved(episodes.steps, episodes.tokens)


def branch_returns(episodes: Episodes, speed_weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Return what keeping was worth at each branch, and what dropping was, [B] each; as :func:`episode_returns`."""
    return (
        episodes.branch_keep + speed_weight * episodes.branch_keep_saved,
        episodes.branch_drop + speed_weight * episodes.branch_drop_saved,
    )


@advantage("group")
def group_advantages(episodes: Episodes, speed_weight: float) -> Samples:
    """Leave-one-out: an episode against the others of its prompt. A prompt with one episode teaches nothing."""
    value = episode_returns(episodes, speed_weight)
    _, group = np.unique(episodes.problem, return_inverse=True)
    size = np.bincount(group)[group] if len(group) else group
    total = np.bincount(group, weights=value)[group] if len(group) else value
    others = np.where(size > 1, (total - value) / np.maximum(size - 1, 1), value)
    taken = np.where(episodes.kept, episodes.probability, 1 - episodes.probability)
    return Samples(
        episodes.statistics, episodes.kept, taken, (value - others)[episodes.episode], np.ones(len(episodes.kept))
    )


@advantage("branch")
def branch_advantages(episodes: Episodes, speed_weight: float) -> Samples:
    """Two samples per branch, one for each action, weighted with the probability the policy gave it.

    The weighted sum is the exact policy gradient at this mismatch, not one drawn action's estimate of it. It counts as
    often as there are mismatches that the branch stands for.
    """
    at = episodes.branch_decision
    keep = episodes.probability[at]
    kept, dropped = branch_returns(episodes, speed_weight)
    mean = keep * kept + (1 - keep) * dropped
    actions = np.concatenate([np.ones(len(at), bool), np.zeros(len(at), bool)])
    probability = np.concatenate([keep, 1 - keep])
    return Samples(
        np.concatenate([episodes.statistics[at]] * 2),
        actions,
        probability,
        np.concatenate([kept - mean, dropped - mean]),
        probability * np.concatenate([episodes.branch_weight] * 2),
    )
