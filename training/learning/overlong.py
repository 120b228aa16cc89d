"""What responses that were cut off at ``max_tokens`` teach: a pure function on episodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vllm_cospec.training.config import LearnerConfig
from vllm_cospec.training.rollout.episodes import Episodes


def treat_overlong(episodes: Episodes, config: LearnerConfig) -> Episodes:
    """Return the episodes as the learner is to see them.

    ``score`` leaves them as they were graded. ``penalise`` takes ``overlong_penalty`` off the reward of a response that
    was cut off. ``mask`` leaves such responses out, and branches of which either answer was cut off.
    """
    if config.overlong == "score":
        return episodes
    if config.overlong == "penalise":
        return replace(
            episodes,
            reward=episodes.reward - config.overlong_penalty * episodes.capped,
            branch_keep=episodes.branch_keep - config.overlong_penalty * episodes.branch_keep_capped,
            branch_drop=episodes.branch_drop - config.overlong_penalty * episodes.branch_drop_capped,
        )
    whole = ~episodes.capped
    decided = whole[episodes.episode]
    # a branch's response is one of its two answers, so that none is left whose decision is gone
    branched = ~(episodes.branch_keep_capped | episodes.branch_drop_capped)
    kept = {"episode": decided, "branch_decision": branched}
    kept |= dict.fromkeys(("problem", "reward", "tokens", "steps", "capped"), whole)
    kept |= dict.fromkeys(("statistics", "kept", "probability", "output_position"), decided)
    kept |= dict.fromkeys((name for name in vars(episodes) if name.startswith("branch_")), branched)
    masked = replace(episodes, **{name: getattr(episodes, name)[rows] for name, rows in kept.items()})
    masked.episode = (np.cumsum(whole) - 1)[masked.episode]
    masked.branch_decision = (np.cumsum(decided) - 1)[masked.branch_decision]
    masked.texts = [text for text, own in zip(episodes.texts, whole, strict=True) if own]
    return masked
