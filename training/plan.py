"""What a run will do and cost, said before it begins: counted from its settings, and estimated from a short probe.

The probe answers some problems on one engine, with the policy a run begins with. What follows from it is an estimate:
answers grow or shrink while an arbiter learns, an engine is faster with more requests at a time, and calibration is
counted as if every threshold gave another answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from rich.table import Table

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.measure.fixed_sequence import threshold_sequence
from vllm_cospec.training.preflight import HELD_OUT_SEED, check_training
from vllm_cospec.training.problems import Problems
from vllm_cospec.training.rollout.actors import RolloutActor
from vllm_cospec.training.rollout.episodes import Episodes
from vllm_cospec.training.rollout.placement import Placed
from vllm_cospec.training.rollout.pool import Pool
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.rollout.units import Unit
from vllm_cospec.training.tasks import Split

Say = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """What the settings of a run add up to."""

    splits: dict[str, int]  # problems of each; empty where the task makes them up
    updates: int
    units: int  # of all updates
    responses: int
    branches: int  # at most: a response may have fewer mismatches
    continuations: int  # answers that are generated for them, at most
    held_out_answers: int  # of all evaluations that choose the best update
    calibration_answers: int  # at most, over all thresholds

    @property
    def answers(self) -> int:
        """All that is generated but for branches, at most."""
        return self.responses + self.held_out_answers + self.calibration_answers


@dataclass(frozen=True)
class Estimate:
    """What a probe makes of it."""

    problems: int
    tokens_per_response: float
    tokens_per_continuation: float
    branches: int
    telling: int  # of these: those that changed the answer
    tokens_per_label: float | None  # generated for each of them; None where there was none
    tokens_per_second: float  # of one engine
    tokens: float  # of the whole run
    engine_hours: float
    hours: float  # with all engines at work


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
        continuations=branching * each * continuations_asked(config),
        held_out_answers=len(evaluated) * selection.problems,
        calibration_answers=config.calibration.problems * len(threshold_sequence(config.calibration.thresholds)),
    )


def continuations_asked(config: TrainConfig) -> int:
    """Return how many continuations a response with enough mismatches has: each branch takes the other action once,
    and both actions as often again as there are further continuations."""
    rollout = config.rollout
    return rollout.branches_per_response * (2 * rollout.continuations_per_action - 1)


def estimate(config: TrainConfig, work: Workload, episodes: Episodes) -> Estimate:
    """Scale the figures of a probe to the whole run.

    Args:
        config: of the run.
        work: that it has to do.
        episodes: of the probe.

    Raises:
        ConfigError: nothing was generated.
    """
    responses, own = len(episodes.tokens), int(episodes.tokens.sum())
    if not responses or not own:
        raise ConfigError("--plan: the probe generated nothing; check task and rollout.max_tokens")
    found = episodes.continuations + episodes.discarded
    per_response, per_continuation = own / responses, (episodes.generated_tokens - own) / max(found, 1)
    share = found / (responses * continuations_asked(config)) if found else 0.0
    tokens = work.answers * per_response + share * work.continuations * per_continuation
    rate = episodes.generated_tokens / max(episodes.generating_s, 1e-9)
    telling = int((episodes.difference() != 0).sum())
    hours = tokens / rate / 3600
    return Estimate(
        problems=len(set(episodes.problem.tolist())),
        tokens_per_response=per_response,
        tokens_per_continuation=per_continuation,
        branches=len(episodes.branch_decision),
        telling=telling,
        tokens_per_label=episodes.generated_tokens / telling if telling else None,
        tokens_per_second=rate,
        tokens=tokens,
        engine_hours=hours,
        hours=hours / config.rollout.actors,
    )


def probe(config: TrainConfig, problems: Problems, count: int, say: Say) -> Episodes:
    """Roll out ``count`` problems on one engine.

    Raises:
        CoSpecError: there is no room for an engine, or it does not start.
    """
    rollout = config.rollout
    chosen = tuple(problems.draw(HELD_OUT_SEED, count, "train", "--probe"))
    alone = config.model_copy(update={"rollout": rollout.model_copy(update={"actors": 1})})
    weights = Learner(config.learner, config.seed, 1).weights()
    actor = Placed(RolloutActor, alone.pair, rollout)
    with (
        engines_session(alone, say),
        Pool(
            lambda: actor.remote(alone, weights), 1, rollout.attempts, rollout.unit_timeout_s,
            rollout.start_timeout_s, notice=say,
        ) as pool,
    ):  # fmt: skip
        unit = Unit(0, 0, chosen, 0, config.seed)
        pool.submit([unit], pool.put(weights))
        return Episodes.merge([part for parts in pool.collect([unit.key]) for part in parts])


def plan(config: TrainConfig, count: int, say: Say) -> tuple[Workload, Estimate | None]:
    """Check a run, count what it will do, and estimate what it costs.

    Args:
        config: of the run.
        count: problems of the probe; 0 for no probe and no estimate.
        say: called with what is left out.

    Raises:
        CoSpecError: it would not start.
    """
    problems = check_training(config, say)
    work = work_of(config, problems)
    return work, estimate(config, work, probe(config, problems, count, say)) if count else None


def table(config: TrainConfig, work: Workload, cost: Estimate | None = None) -> Table:
    """Show a plan."""
    found = Table(show_header=False, title=f"{config.task.name}: what the run will do")
    splits = ", ".join(f"{count:,} {split}" for split, count in work.splits.items()) or "made up as they are needed"
    more = f" with {work.continuations:,} continuations" if work.continuations != work.branches else ""
    rows = [
        ("problems", splits),
        ("updates", f"{work.updates:,}, of {work.units // work.updates} units: {work.responses:,} responses and at "
                    f"most {work.branches:,} branches" + more),
        ("choosing what ships", f"{work.held_out_answers:,} answers to held-out problems"),
        ("calibration", f"at most {work.calibration_answers:,} answers"),
        ("engines", f"{config.rollout.actors}, of {config.rollout.cpus_per_actor:g} CPUs and "
                    f"{config.rollout.gpus_per_actor:g} GPUs each"),
    ]  # fmt: skip
    if cost is not None:
        label = f"{cost.tokens_per_label:,.0f} tokens for each" if cost.tokens_per_label else "check task.reward"
        rows += [
            ("probe", f"{cost.problems} problems on one engine: {cost.tokens_per_response:.0f} tokens a response, "
                      f"{cost.tokens_per_continuation:.0f} a branch's continuation, "
                      f"{cost.tokens_per_second:,.0f} tokens/s"),
            ("telling labels", f"{cost.telling} of {cost.branches} branches changed the answer; {label}"),
            ("estimate", f"{cost.tokens / 1e6:,.2f} million tokens, {cost.engine_hours:,.2f} engine hours, "
                         f"{cost.hours:,.2f} hours with all engines, without their start"),
        ]  # fmt: skip
    for row in rows:
        found.add_row(*row)
    return found
