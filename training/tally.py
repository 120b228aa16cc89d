"""What a run has cost so far, and the figures of one iteration."""

from __future__ import annotations

import math

from vllm_cospec.training.rollout.episodes import Episodes


class Tally:
    """Sums over a run; a checkpoint keeps ``totals``."""

    def __init__(self, actors: int, totals: dict[str, float] | None = None):
        """Args:
        actors: how many engines there are.
        totals: of an earlier part of the run.
        """
        self._actors = actors
        self.totals: dict[str, float] = dict(totals or {})

    def started(self, seconds: float) -> None:
        """Count the time in which engines started."""
        self._add("start_seconds", seconds)

    def count(self, episodes: Episodes, seconds: float) -> None:
        """Count an iteration that took so many seconds."""
        for name, value in (
            ("responses", len(episodes.reward)),
            ("branches", len(episodes.branch_decision)),
            ("discarded_branches", episodes.discarded),
            ("telling_branches", int((episodes.difference() != 0).sum())),
            ("grader_failures", len(episodes.failures)),
            ("generated_tokens", episodes.generated_tokens),
            ("generating_seconds", episodes.generating_s),
            ("actor_seconds", seconds * self._actors),
            ("seconds", seconds),
        ):
            self._add(name, value)

    def _add(self, name: str, value: float) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + value

    def __getitem__(self, name: str) -> float:
        """Return a total; 0 before anything was counted."""
        return self.totals.get(name, 0.0)

    @property
    def idle_share(self) -> float:
        """Share of the actors' time that was not spent generating, from the moment they were ready."""
        return self._idle(self["actor_seconds"])

    @property
    def idle_share_with_start(self) -> float:
        """The same share, with the time in which the engines started."""
        return self._idle(self["actor_seconds"] + self["start_seconds"] * self._actors)

    def _idle(self, seconds: float) -> float:
        return 1 - self["generating_seconds"] / seconds if seconds else float("nan")

    def figures(self, episodes: Episodes) -> dict[str, float]:
        """Return what the log shows of an iteration; NaN where there is nothing to say."""
        difference = episodes.difference()
        decisions, responses, branches = len(episodes.kept), len(episodes.reward), len(difference)
        return {
            "accuracy": float(episodes.reward.mean()) if responses else math.nan,
            "acceptance_length": episodes.acceptance_length,
            "override_rate": float(episodes.kept.mean()) if decisions else math.nan,
            "mismatches_per_response": decisions / max(1, responses),
            "capped": float(episodes.capped.mean()) if responses else math.nan,
            "branches": float(branches),
            "discarded_branches": float(episodes.discarded),
            "telling": float((difference != 0).mean()) if branches else math.nan,
            "keep_was_better": float((difference > 0).mean()) if branches else math.nan,
            "keep_was_worse": float((difference < 0).mean()) if branches else math.nan,
            "grader_failures": float(len(episodes.failures)),
            "generated_tokens": self["generated_tokens"],
            "rollouts_per_s": episodes.graded / max(episodes.busy_s, 1e-9) * self._actors,
            "seconds": self["seconds"],
            "idle_share": self.idle_share,
        }
