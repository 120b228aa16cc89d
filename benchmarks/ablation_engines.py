"""What the ablations are trained and measured with: engines on Ray, or a single one in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from vllm_cospec.training.commands import notice
from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.learning.learner import Learner
from vllm_cospec.training.measure.calibrate import Answered, Part, answer_part
from vllm_cospec.training.measure.evaluate import Answers, answer, chunks_of, evaluate
from vllm_cospec.training.measure.modes import parse_mode
from vllm_cospec.training.measure.outcome import Outcome
from vllm_cospec.training.rollout.actors import EngineActor
from vllm_cospec.training.rollout.engine import Engine
from vllm_cospec.training.rollout.in_process import InProcess, rollouts, training_engine
from vllm_cospec.training.rollout.placement import Placed
from vllm_cospec.training.rollout.pool import Pool, UnitPool
from vllm_cospec.training.rollout.session import engines_session
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.grading import Graders
from vllm_cospec.training.trainer import Trainer

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Piece(Part):
    """Some problems for one arbiter."""

    arbiter: str

    @property
    def key(self) -> Any:
        """Identifies it."""
        return self.arbiter, self.thresholds, self.temperature, self.index


def judge(engine: Engine, graders: Graders, most: int, piece: Piece, weights: Weights) -> Answered:
    """Answer some problems with an arbiter; ``most`` tokens are the longest answer."""
    engine.set_arbiter(weights, sample_actions=False)
    return answer_part(engine, graders, piece, most)


class Judge(EngineActor):
    """An engine that answers problems with the arbiter that comes along."""

    def __init__(self, config: TrainConfig, weights: Weights):
        super().__init__(config.pair, config.task, config.learner.in_training(weights))
        self._max_tokens = config.rollout.max_tokens

    def work(self, piece: Piece, weights: Weights) -> Answered:
        """Answer some problems."""
        self.ready()
        return judge(self._engine, self._graders, self._max_tokens, piece, weights)


class Engines(Protocol):
    """Use as a context manager around everything that is trained and measured."""

    def __enter__(self) -> Engines: ...

    def __exit__(self, *_: object) -> None: ...

    def draft(self, k: int) -> bool:
        """Whether there are engines that draft ``k`` tokens a step."""

    def train(self, trainer: Trainer) -> None:
        """Train a run to its end."""

    def judging(self, config: TrainConfig, weights: Weights) -> contextlib.AbstractContextManager[UnitPool]:
        """Return a pool that answers :class:`Piece`; payloads are an arbiter's weights, the first of them given."""

    def outcome(self, config: TrainConfig, rule: str, problems: Sequence[Problem]) -> Outcome:
        """Answer problems by a rule; nothing is trained or judged afterwards."""


class OnRay(contextlib.nullcontext[Any]):
    """Engines as ``cospec train`` has them: started for each run, and for each K that is served."""

    def draft(self, k: int) -> bool:
        """As :meth:`Engines.draft`."""
        return True

    def train(self, trainer: Trainer) -> None:
        """As :meth:`Engines.train`."""
        trainer.run()

    @contextlib.contextmanager
    def judging(self, config: TrainConfig, weights: Weights) -> Iterator[UnitPool]:
        """As :meth:`Engines.judging`."""
        actor = Placed(Judge, config.pair, config.rollout)
        with (
            engines_session(config, notice),
            Pool(lambda: actor.remote(config, weights), config.rollout.actors, depth=1) as pool,
        ):
            yield pool

    def outcome(self, config: TrainConfig, rule: str, problems: Sequence[Problem]) -> Outcome:
        """As :meth:`Engines.outcome`."""
        with engines_session(config, notice):
            found = evaluate(config.pair, config.task, config.rollout, [parse_mode(rule)], problems)
        return found[rule].outcome


class OneEngine:
    """An engine of this process, which drafts as many tokens as it was started with."""

    def __init__(self, config: TrainConfig, k: int):
        """Describe it; it is started by the block.

        Args:
            config: of pair, task and learner.
            k: draft tokens a step.
        """
        self._k = k
        pair = config.pair.model_copy(update={"num_speculative_tokens": k})
        weights = Learner(config.learner, config.seed, 1).weights()
        self._started = training_engine(config.model_copy(update={"pair": pair}), weights)

    def __enter__(self) -> OneEngine:
        self._engine, self._graders = self._started.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._started.__exit__(*error)

    def draft(self, k: int) -> bool:
        """As :meth:`Engines.draft`."""
        return k == self._k

    def train(self, trainer: Trainer) -> None:
        """As :meth:`Engines.train`."""
        trainer.run_with(rollouts(self._engine, self._graders, trainer.config))

    @contextlib.contextmanager
    def judging(self, config: TrainConfig, weights: Weights) -> Iterator[UnitPool]:
        """As :meth:`Engines.judging`."""
        yield InProcess(partial(judge, self._engine, self._graders, config.rollout.max_tokens))

    def outcome(self, config: TrainConfig, rule: str, problems: Sequence[Problem]) -> Outcome:
        """As :meth:`Engines.outcome`."""
        mode, most = parse_mode(rule), config.rollout.max_tokens
        answers = [answer(self._engine, chunk, self._graders, most) for chunk in chunks_of(mode, problems)]
        return Answers.merge(answers).outcome
