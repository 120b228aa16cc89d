"""Units of work: some problems of an iteration, rolled out together by one actor."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_cospec.training.tasks import Problem


@dataclass(frozen=True)
class Unit:
    """What an actor does at a time. Its result depends on nothing else but the weights."""

    iteration: int
    index: int  # within the iteration
    problems: tuple[Problem, ...]
    first_problem: int  # number of the first one within the iteration
    seed: int
    threshold: float | None = None  # None: actions are sampled, as training wants them
    branches: bool = True  # whether the other road is taken at some mismatches, where the learner wants that

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Identifies the unit, and each of the parts it may be taken into."""
        return self.iteration, self.index, self.first_problem, len(self.problems)

    def split(self) -> list[Unit]:
        """One unit per problem."""
        return [
            replace(self, problems=(problem,), first_problem=self.first_problem + i)
            for i, problem in enumerate(self.problems)
        ]
