"""What a run will do, counted from its settings before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from rich.table import Table

from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.tasks import Split


@dataclass(frozen=True)
class Workload:
    """What the settings of a run add up to."""

    splits: dict[str, int]  # problems of each; empty where the task makes them up
    updates: int
    units: int  # of all updates
    responses: int
    branches: int  # at most: a response may have fewer mismatches
    held_out_answers: int  # of all evaluations that choose the best update
    calibration_answers: int  # at most, over all thresholds

    @property
    def answers(self) -> int:
        """All that is generated but for branches."""
        return self.responses + self.held_out_answers + self.calibration_answers


def work_of(config: TrainConfig, problems: Problems) -> Workload:
    """Count what a run will do."""
    rollout, learner, selection = config.rollout, config.learner, config.selection
    warm, updates = learner.warm_start_iterations, config.iterations
    each = rollout.prompts_per_iteration * rollout.responses_per_prompt
    branching = updates if learner.advantage == "branch" else warm
    evaluated = [
        update for update in range(max(warm, 1), updates + 1)
        if selection.every and (update % selection.every == 0 or update == updates)
    ]  # fmt: skip
    known = {split: len(problems.known(split)) for split in get_args(Split)}
    return Workload(
        splits=known if any(known.values()) else {},
        updates=updates,
        units=updates * -(-rollout.prompts_per_iteration // rollout.prompts_per_unit),
        responses=updates * each,
        branches=branching * each * rollout.branches_per_response,
        held_out_answers=len(evaluated) * selection.problems,
        calibration_answers=config.calibration.problems * (1 + len(set(config.calibration.thresholds))),
    )


def table(config: TrainConfig, work: Workload) -> Table:
    """Show a plan."""
    found = Table(show_header=False, title=f"{config.task.name}: what the run will do")
    splits = ", ".join(f"{count:,} {split}" for split, count in work.splits.items()) or "made up as they are needed"
    for name, value in (
        ("problems", splits),
        ("updates", f"{work.updates:,}, of {work.units // work.updates} units: {work.responses:,} responses and at "
                    f"most {work.branches:,} branches"),
        ("choosing what ships", f"{work.held_out_answers:,} answers to held-out problems"),
        ("calibration", f"at most {work.calibration_answers:,} answers"),
        ("engines", f"{config.rollout.actors}, of {config.rollout.cpus_per_actor:g} CPUs and "
                    f"{config.rollout.gpus_per_actor:g} GPUs each"),
    ):  # fmt: skip
        found.add_row(name, value)
    return found
