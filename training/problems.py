"""The problems a run asks: drawn from a task's splits, without those that cannot be asked or are held out.

A prompt can be asked when it leaves room for a response. What becomes of one that does not is a setting: the run is
refused before it starts, or the prompt is left out and counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import PairConfig, RolloutConfig, TaskConfig
from vllm_cospec.training.prompts import Prompts, max_model_len, target_tokenizer
from vllm_cospec.training.tasks import Problem, Split, load_task
from vllm_cospec.training.tasks.datasets import Records

SHOWN = 3  # of the prompts that are too long
MOST = 10  # times the problems that are wanted are drawn in search of such as can be asked


class Problems:
    """Draws problems of a task; the same ones for the same arguments."""

    def __init__(self, pair: PairConfig, task: TaskConfig, rollout: RolloutConfig):
        """Load the task and the tokenizer.

        Raises:
            ConfigError: one of them cannot be had.
        """
        self.task = load_task(task.name, **task.options)
        self._prompts = Prompts(target_tokenizer(pair), task)
        self._limit = max_model_len(pair)
        self._rollout = rollout
        self._lengths: dict[str, int] = {}
        self.left_out: set[str] = set()  # prompts

    def draw(self, seed: int, n: int, split: Split, where: str, without: Collection[str] = ()) -> list[Problem]:
        """Draw problems that can be asked.

        Args:
            seed, n, split: as for :meth:`Task.problems`.
            where: the setting that asks for so many, for messages.
            without: prompts that are not wanted.

        Raises:
            ConfigError: the task has too few.
        """
        asked, spare = n, len(without)
        while True:
            try:
                drawn = self.task.problems(seed, asked + spare, split)
            except ConfigError as error:
                others = f", and {len(without)} more are held out" if without else ""
                raise ConfigError(f"{where}: {n} problems are asked for{others}; {error}") from None
            fitting = [problem for problem in drawn if problem.prompt not in without and self.fits(problem)]
            if len(fitting) >= n:
                return fitting[:n]
            if asked > MOST * n:
                self.check_lengths(drawn)
                raise ConfigError(
                    f"{where}: {n} problems are asked for; of {len(drawn)} only {len(fitting)} can be asked"
                )
            asked += n - len(fitting)

    def fits(self, problem: Problem) -> bool:
        """Whether a prompt leaves room for a response; one that does not is counted."""
        fitting = self._limit is None or self.length(problem) + self._rollout.least_room <= self._limit
        if not fitting:
            self.left_out.add(problem.prompt)
        return fitting

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt."""
        return self._prompts.encode(prompt)

    def length(self, problem: Problem) -> int:
        """Return the number of tokens of a prompt."""
        if problem.prompt not in self._lengths:
            self._lengths[problem.prompt] = len(self.encode(problem.prompt))
        return self._lengths[problem.prompt]

    def known(self, split: Split) -> list[Problem]:
        """Return all problems of a split where the task has them all; none where it makes them up."""
        return self.task.everything(split) if isinstance(self.task, Records) else []

    def check_lengths(self, problems: Sequence[Problem]) -> str:
        """Look for prompts that leave no room.

        Returns:
            A sentence about those that are left out; empty when there are none.

        Raises:
            ConfigError: there are some, and ``rollout.long_prompts`` refuses them.
        """
        long = [problem for problem in problems if not self.fits(problem)]
        if not long:
            return ""
        names = "; ".join(
            f"{problem.source or repr(problem.prompt[:60])}: {self.length(problem)} tokens" for problem in long[:SHOWN]
        )
        text = (
            f"{len(long)} of {len(problems)} prompts leave fewer than {self._rollout.least_room} of {self._limit} "
            f"tokens for a response ({names}{'; ...' if len(long) > SHOWN else ''})"
        )
        if self._rollout.long_prompts == "refuse":
            raise ConfigError(
                f'rollout.long_prompts: {text}; raise pair.engine.max_model_len, or set it to "leave_out"'
            )
        return f"{text} and are left out"
