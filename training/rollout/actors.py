"""The Ray actors: thin shells around an engine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any

import ray

from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.server import interruptible
from vllm_cospec.training.config import PairConfig, TrainConfig
from vllm_cospec.training.rollout.episodes import Episodes, Unit

START_ATTEMPTS = 3
ACTOR_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class RolloutActor:
    """An engine that collects, for training."""

    def __init__(self, config: TrainConfig, weights: dict[str, Any]):
        from vllm_cospec.training.rollout.engine import Engine
        from vllm_cospec.training.tasks import load_task
        from vllm_cospec.training.tasks.rewards import load_reward

        self._config = config
        self._failure: Exception | None = None
        try:
            task = load_task(config.task.name, **config.task.options)
            self._reward = load_reward(config.task.reward, task)
            arbiter = {"hidden_sizes": tuple(config.learner.hidden_sizes), "state_dict": weights}
            self._engine = Engine(config.pair, arbiter)
        except Exception as error:
            self._failure = error

    def ready(self) -> bool:
        """Resolve once the engine is there; raises what kept it from starting."""
        _raise_plainly(self._failure)
        return True

    def work(self, unit: Unit, weights: dict[str, Any]) -> Episodes:
        """Roll out a unit with these weights."""
        from vllm_cospec.training.rollout.episodes import roll_out

        _raise_plainly(self._failure)
        self._engine.set_arbiter(weights, sample_actions=unit.threshold is None)
        return roll_out(self._engine, unit, self._config, self._reward)


class EvaluationActor:
    """An engine that answers without sampling actions."""

    def __init__(self, pair: PairConfig, task: Any, arbiter: dict[str, Any] | None, role: str, max_tokens: int):
        from vllm_cospec.training.rollout.engine import Engine
        from vllm_cospec.training.tasks import load_task
        from vllm_cospec.training.tasks.rewards import load_reward

        self._task = task
        self._max_tokens = max_tokens
        self._failure: Exception | None = None
        try:
            self._reward = load_reward(task.reward, load_task(task.name, **task.options))
            self._engine = Engine(pair, arbiter, role)
        except Exception as error:
            self._failure = error

    def ready(self) -> bool:
        """Resolve once the engine is there; raises what kept it from starting."""
        _raise_plainly(self._failure)
        return True

    def work(self, unit: Any, payload: None) -> Any:
        """Answer a chunk of problems in one mode."""
        from vllm_cospec.training.measure.evaluate import answer

        _raise_plainly(self._failure)
        return answer(self._engine, unit, self._reward, self._task.reward_timeout_s, self._max_tokens)


def _raise_plainly(failure: Exception | None) -> None:
    """Raise what went wrong in a constructor as an error of the driver's own kind.

    Ray reports an exception of a constructor like a death, and the pool would try again: but an engine that cannot be
    built once cannot be built the second time. The vLLM types may not survive pickling, a sentence does.
    """
    if isinstance(failure, CoSpecError):
        raise failure
    if failure is not None:
        reason = _one_line(failure) or "no reason given"
        raise ConfigError(f"the engine cannot be started: {type(failure).__name__}: {reason}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def remote(actor: type, cpus: float, gpus: float) -> Any:
    """Return a Ray actor class of ``actor`` with its resources and environment."""
    threads = str(max(1, int(cpus)))
    environment = {**ACTOR_ENVIRONMENT, "OMP_NUM_THREADS": threads}
    return ray.remote(actor).options(
        num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": environment}
    )


@contextlib.contextmanager
def ray_session(address: str | None, cpus: float) -> Iterator[None]:
    """Connect to a cluster, or run one on this machine that ends with the block.

    Args:
        address: of a cluster; None starts one that listens on this machine only.
        cpus: that the local one offers; it may be more than the machine has.

    Raises:
        ConfigError: Ray cannot be reached, or does not start.
        KeyboardInterrupt: at SIGINT and SIGHUP, so that the local one is stopped and leaves nothing behind.
        SystemExit: at SIGTERM, from the handler that Ray installs; it unwinds the stack as well.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:  # Ray listens on every interface and asks for a token; else it would keep one in the home
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's processes may still be writing when they are told to end, hence ignore_cleanup_errors.
    with interruptible(), tempfile.TemporaryDirectory(prefix="cospec-ray-", ignore_cleanup_errors=True) as scratch:
        try:
            if address is None:
                _start_ray(cpus, scratch)
            else:
                _join_ray(address)
            yield
        finally:
            ray.shutdown()


def _start_ray(cpus: float, scratch: str) -> None:
    """Start Ray here; again, when its node did not answer within Ray's 30 seconds: the machine may be busy."""
    reason = ""
    for _ in range(START_ATTEMPTS):
        try:
            ray.init(
                num_cpus=max(1, int(-(-cpus // 1))),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=256 * 2**20,
                _node_ip_address="127.0.0.1",
                _temp_dir=scratch,
            )
            return
        except Exception as error:  # Ray raises bare Exceptions here
            reason = _one_line(error)
    raise ConfigError(
        f"ray_address: Ray does not start on this machine ({reason}); name a running cluster, or try again"
    )


def _join_ray(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False)
    except Exception as error:
        reason = _one_line(error)
        raise ConfigError(f"ray_address: {address!r} cannot be used ({reason}); is a cluster running there?") from None
