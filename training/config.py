"""The configuration of a training run: the only source of its settings' names, types, defaults and help.

A configuration is a TOML file with a table for each part below. Paths in it are relative to the file;
``bundled:target`` and ``bundled:draft`` name the pair that comes with the package, ``smollm2:target``, ``code:target``
and so on those that ``training/pairs/`` builds in the user's cache. Imports no torch.
"""

from __future__ import annotations

import math
import os
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from vllm_cospec.errors import ConfigError, first_sentence
from vllm_cospec.kernels.frozen import Frozen

PAIR_NAMES = tuple(f"{pair}:{role}" for pair in ("bundled", "smollm2", "code") for role in ("target", "draft"))


class PairConfig(Frozen):
    """The two models and how vLLM runs them."""

    target: str
    """Directory or hub id of the target."""
    draft: str | None = None
    """Directory or hub id of the draft; left out for drafters without a model (ngram, suffix)."""
    draft_method: str | None = None
    """vLLM's method for the drafter; left out: what vLLM detects."""
    num_speculative_tokens: int = Field(ge=1, le=128)
    """K. An arbiter is served best with the K it was trained with."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's ``LLM``, for example dtype, max_model_len, max_num_seqs."""
    speculative: dict[str, Any] = Field(default_factory=dict)
    """Further keys of vLLM's speculative configuration, for example prompt_lookup_max."""

    @model_validator(mode="after")
    def _check(self) -> PairConfig:
        if self.draft is None and self.draft_method not in ("ngram", "suffix", "mtp"):
            raise ValueError("draft: missing; name a draft model, or a draft_method that needs none (ngram)")
        return self

    @property
    def ranks(self) -> int:
        """Processes that share one engine: tensor times pipeline parallelism."""
        sizes = (self.engine.get(f"{kind}_parallel_size") for kind in ("tensor", "pipeline"))
        return math.prod(size for size in sizes if isinstance(size, int) and size > 0)

    @property
    def ranks_are_ray_actors(self) -> bool:
        """Whether vLLM starts the ranks of an engine as Ray actors, and not as child processes."""
        return self.engine.get("distributed_executor_backend") == "ray"

    def speculative_config(self, arbiter: str | dict[str, Any] | None) -> dict[str, Any]:
        """Return vLLM's speculative configuration for this pair.

        Args:
            arbiter: an artefact or a policy, as cospec's key of that name takes it; None for stock's strict
                verification, without cospec.
        """
        drafter: dict[str, Any] = {"num_speculative_tokens": self.num_speculative_tokens, **self.speculative}
        if self.draft:
            drafter["model"] = self.draft
        if arbiter is None:
            return {"method": self.draft_method or "draft_model", **drafter}
        if self.draft_method:
            drafter["draft_method"] = self.draft_method
        return {"method": "cospec", "arbiter": arbiter, **drafter}


class TaskConfig(Frozen):
    """Where problems come from and what counts as right."""

    name: str = "demo"
    """demo, jsonl, dataset (by the datasets library), code (functions with tests), or reasoning_gym."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task: path, test_path, template for jsonl; path, name, split, revision for dataset and code; generator and
    its own options for reasoning_gym."""
    system: str | None = None
    """System prompt."""
    chat_template: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, for example {enable_thinking = false}."""
    apply_chat_template: bool | None = None
    """Whether prompts go through the chat template; left out: where the tokenizer has one."""
    reward: str = "task"
    """task (the task's own), math_verify, exact, or module:function, called with (problem, text) and returning a
    number."""
    reward_timeout_s: float = Field(10.0, gt=0)
    """Seconds one reward may take."""
    reward_memory_gb: float = Field(4.0, gt=0)
    """GiB of address space a grading process may use."""
    reward_processes: int = Field(1, ge=1)
    """Grading processes beside each engine."""
    max_failed_rewards: float = Field(0.01, ge=0, lt=1)
    """Share of the answers whose reward may throw, hang or return no number; they score 0. Above it the run ends."""


class RolloutConfig(Frozen):
    """How responses are generated."""

    actors: int = Field(2, ge=1)
    """Number of engines."""
    cpus_per_actor: float = Field(1.0, ge=0)
    """CPUs Ray reserves for each; also its number of OpenMP threads on a machine without GPUs, at least 1."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs Ray reserves for each, all on one node; with ``pair.engine.tensor_parallel_size`` as many as that. With
    ``pair.engine.distributed_executor_backend = "ray"`` each actor has them in a placement group of its own."""
    prompts_per_iteration: int = Field(256, ge=1)
    """Problems between two updates."""
    prompts_per_unit: int = Field(64, ge=1)
    """Problems an actor takes at a time. Results do not depend on which actor takes them."""
    responses_per_prompt: int = Field(1, ge=1)
    """G. Group advantages need at least 2."""
    branches_per_response: int = Field(2, ge=0)
    """Branch advantages: mismatches of each response at which the other continuation is rolled out too."""
    max_tokens: int = Field(512, ge=1)
    """Longest response."""
    long_prompts: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of prompts that leave no room for a response: refuse ends with their lines before anything starts,
    leave_out counts them and goes on."""
    least_room: int = Field(16, ge=1)
    """Tokens a prompt must leave for its response, of the engine's max_model_len."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Of the token sampling; 0 is greedy. The arbiter's actions are sampled in any case."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of the token sampling."""
    continuations_per_action: int = Field(1, ge=1, le=64)
    """Branches of sampled responses: answers that are drawn for each of the two actions, of which the mean counts. One
    is unbiased as well, and noisier."""
    max_staleness: int = Field(1, ge=0, le=4)
    """Updates the weights of a rollout may lie behind, so that actors need not wait for the learner."""
    unit_timeout_s: float = Field(900.0, gt=0)
    """Seconds after which an actor that still works on one unit is replaced."""
    start_timeout_s: float = Field(900.0, gt=0)
    """Seconds an engine may take to start."""
    attempts: int = Field(3, ge=1)
    """How often a unit may lose its actor before it is taken apart, and a single prompt before it is set aside."""


class LearnerConfig(Frozen):
    """How the arbiter learns."""

    advantage: str = "branch"
    """branch or group."""
    objective: Literal["policy_gradient", "labels"] = "policy_gradient"
    """How branches teach. policy_gradient: each iteration's once, as the gradient at their mismatches. labels: all of
    the run's, again and again; which action was worth more is fitted, weighted with by how much. labels needs fewer
    branches where few of them change an answer, with a weight_decay of about 3. For advantage = "branch" only."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, times the learning rate at each step: weights that nothing speaks for shrink."""
    hidden_sizes: tuple[int, ...] = Field((32, 32), min_length=1, max_length=2, strict=False)
    """Widths of the hidden layers."""
    start: str | None = None
    """Directory of an arbiter to go on from, of the same hidden sizes; left out: a new one."""
    initial_keep: float = Field(0.1, gt=0, lt=1)
    """Probability with which a new arbiter keeps a draft."""
    warm_start_iterations: int = Field(4, ge=0)
    """First iterations, whose branch outcomes are collected as labels and fitted; 0 for none."""
    warm_start_epochs: int = Field(30, ge=1)
    """Passes over the labels."""
    learning_rate: float = Field(3e-3, gt=0)
    """Adam's, at the start; it falls linearly to a tenth."""
    epochs: int = Field(4, ge=1)
    """Passes over the samples of an iteration."""
    minibatch_size: int = Field(512, ge=1)
    """Samples per step."""
    clip: float = Field(0.2, gt=0)
    """Importance ratios are clipped to 1 - clip .. 1 + clip."""
    entropy_bonus: float = Field(1e-3, ge=0)
    """Weight of the policy's entropy."""
    kl_penalty: float = Field(0.0, ge=0)
    """Weight of the divergence from the policy after the warm start."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    speed_weight: float = Field(0.02, ge=0, lt=1)
    """Reward for the share of target steps saved, 1 - steps / tokens, next to 1 for a right answer."""
    overlong: Literal["score", "mask", "penalise"] = "score"
    """What responses teach that were cut off at max_tokens: what they were graded, nothing (mask), or overlong_penalty
    less than that (penalise)."""
    overlong_penalty: float = Field(0.5, ge=0)
    """Taken off the reward of a response that was cut off, where overlong says so."""

    def in_training(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Return an arbiter of these weights as an engine takes one that is in training."""
        return {"hidden_sizes": self.hidden_sizes, "state_dict": weights}


class SelectionConfig(Frozen):
    """Which checkpoint is shipped: the best one on training problems that are held out."""

    every: int = Field(10, ge=0)
    """Updates between two evaluations; the last update is evaluated too. 0: the last update is shipped."""
    problems: int = Field(200, ge=1)
    """Problems of the training split that are held out for it, and never trained on."""


class CalibrationConfig(Frozen):
    """How the threshold is chosen after training."""

    problems: int = Field(1000, ge=20)
    """Problems of the calibration split."""
    thresholds: tuple[float, ...] = Field((0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), min_length=1, strict=False)
    """Tried thresholds, from 0 to 1; others beyond them are added up to both ends: keep nothing, keep everything."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Confidence of the bounds of the loss."""
    max_accuracy_loss: float = Field(0.01, ge=0, lt=1)
    """The threshold that ships loses no more than this with that confidence; where none does, strict ships."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Of the token sampling, as it will be served; left out: the rollout's."""

    @field_validator("thresholds")
    @classmethod
    def _check(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= threshold <= 1 for threshold in value):
            raise ValueError(f"thresholds lie from 0 to 1, got {list(value)}")
        return value


class TrainConfig(Frozen):
    """A training run."""

    pair: PairConfig
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    selection: SelectionConfig = SelectionConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    iterations: int = Field(100, ge=1)
    """Updates of the arbiter, warm start included. May be raised when a run is continued; the learning rate falls over
    the new number from there on."""
    seed: int = Field(1, ge=0, lt=2**31)
    """Decides problems, actions, initial weights and minibatches."""
    ray_address: str | None = None
    """Address of a running Ray cluster; left out: one is started on this machine and stopped afterwards."""

    @property
    def served_temperature(self) -> float:
        """Of the token sampling where thresholds are tried: as it will be served."""
        given = self.calibration.temperature
        return self.rollout.temperature if given is None else given

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        branching = self.learner.advantage == "branch" or self.learner.warm_start_iterations
        if branching and self.rollout.branches_per_response == 0:
            raise ValueError(
                "rollout.branches_per_response: 0 leaves branch advantages and the warm start nothing to learn from"
            )
        if self.rollout.continuations_per_action > 1 and self.rollout.temperature == 0:
            raise ValueError(
                f"rollout.continuations_per_action: {self.rollout.continuations_per_action} greedy continuations are "
                f"all the same; use 1, or a rollout.temperature above 0"
            )
        if self.learner.advantage == "group" and self.rollout.responses_per_prompt < 2:
            raise ValueError(
                f"rollout.responses_per_prompt: {self.rollout.responses_per_prompt} is too few for group advantages; "
                f"use at least 2"
            )
        if self.learner.objective == "labels" and self.learner.advantage != "branch":
            raise ValueError(
                f'learner.objective: "labels" are those of branches; set learner.advantage = "branch" instead of '
                f'"{self.learner.advantage}", or leave it out'
            )
        ranks = self.pair.ranks
        if 0 < self.rollout.gpus_per_actor < ranks:
            raise ValueError(
                f"rollout.gpus_per_actor: {self.rollout.gpus_per_actor:g} is too few for an engine of {ranks} ranks "
                f"(pair.engine); set it to {ranks}"
            )
        if self.pair.ranks_are_ray_actors and not (gpus := self.rollout.gpus_per_actor) == int(gpus) > 0:
            raise ValueError(
                f"rollout.gpus_per_actor: {gpus:g}, but ranks that are Ray actors "
                f"(pair.engine.distributed_executor_backend) take a whole GPU each; set it to {ranks}"
            )
        if self.learner.warm_start_iterations >= self.iterations:
            raise ValueError(
                f"learner.warm_start_iterations: {self.learner.warm_start_iterations} must be less than "
                f"iterations={self.iterations}"
            )
        return self


def load_train_config(path: Path) -> TrainConfig:
    """Read and check a configuration file; its paths come back absolute.

    Raises:
        ConfigError: names the file or the field, the value and the way out.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); pass a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_sentence(error, str(path))) from None
    pair = config.pair.model_copy(
        update={"target": locate(config.pair.target, path), "draft": locate(config.pair.draft, path)}
    )
    paths = "path", "test_path", "tokenizer"
    options = {k: locate(v, path) if k in paths else v for k, v in config.task.options.items()}
    task = config.task.model_copy(update={"options": options})
    learner = config.learner.model_copy(update={"start": locate(config.learner.start, path)})
    return config.model_copy(update={"pair": pair, "task": task, "learner": learner})


def require_models(pair: PairConfig) -> None:
    """Refuse a pair of which one is not where the configuration says, before minutes are spent on starting engines.

    Raises:
        ConfigError: names the field and the directory. Hub ids are left to vLLM.
    """
    for role in ("target", "draft"):
        model = getattr(pair, role)
        if model is not None and Path(model).is_absolute() and not (Path(model) / "config.json").is_file():
            raise ConfigError(
                f"pair.{role}: no model at {model!r} (config.json is missing); name a model directory or hub id"
            )


def bundled(role: Literal["target", "draft"]) -> Path:
    """Return the directory of one model of the bundled pair."""
    return Path(str(files("vllm_cospec.demo"))) / role


def cached_pair(name: str) -> Path:
    """Return where a pair that is built on this machine is kept: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vllm-cospec" / name


def locate(value: Any, config: Path) -> Any:
    """Make a path that is relative to the configuration absolute, and a known pair's name a path; hub ids stay."""
    if value in PAIR_NAMES:
        pair, _, role = value.partition(":")
        return str((bundled("target").parent if pair == "bundled" else cached_pair(pair)) / role)
    if isinstance(value, str) and (value.startswith(".") or (config.parent / value).exists()):
        return str((config.parent / value).resolve())
    return value
