"""A Ray session: a cluster that is joined, or one on this machine that ends with the block."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from vllm_cospec.errors import ConfigError, CoSpecError, TrainingError, one_line
from vllm_cospec.server import interruptible, interrupts_held_back
from vllm_cospec.training.config import TrainConfig
from vllm_cospec.training.rollout.losses import cause_of, said_by

START_ATTEMPTS = 3
# Ray's sockets lie about 65 characters below its directory, and a socket's path may have 107.
LONGEST_DIRECTORY = 40
SHORT_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would start workers in environments of their own
}


@contextlib.contextmanager
def engines_session(
    config: TrainConfig, say: Callable[[str], None] = lambda text: None, logs: Path | None = None
) -> Iterator[None]:
    """Have a Ray session that has room for engines.

    Args:
        config: how many engines, with which resources, on which cluster.
        say: called with a sentence when some of them find no room.
        logs: directory that receives the logs of a local session that ends in an error.

    Raises:
        ConfigError: there is no room for a single one.
    """
    rollout = config.rollout
    with ray_session(config.ray_address, rollout.actors * rollout.cpus_per_actor, logs, say):
        require_room(rollout.actors, rollout.cpus_per_actor, rollout.gpus_per_actor, say)
        if config.ray_address is not None:
            say_what_others_use(rollout.actors, rollout.cpus_per_actor, rollout.gpus_per_actor, say)
        yield


@contextlib.contextmanager
def ray_session(
    address: str | None, cpus: float, logs: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Connect to a cluster, or run one on this machine that ends with the block.

    Args:
        address: of a cluster; None starts one that listens on this machine only, whatever RAY_ADDRESS says.
        cpus: that the local one offers; it may be more than the machine has.
        logs: directory that receives the local one's logs when the block ends in an error; None for one in the
            directory for temporary files.
        say: called with a sentence about where they are.

    Raises:
        ConfigError: Ray cannot be reached, or does not start.
        TrainingError: an error of Ray ended the block; says what to change where memory was short.
        KeyboardInterrupt: at SIGINT and SIGHUP, so that the local one is stopped and leaves nothing behind.
        SystemExit: at SIGTERM, from the handler that Ray installs; it unwinds the stack as well.
    """
    if ray.is_initialized():
        raise ConfigError("ray_address: Ray runs in this process already; call ray.shutdown() first")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:  # Ray listens on every interface and asks for a token; else it would keep one in the home
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's processes may still be writing when they are told to end, hence ignore_cleanup_errors.
    with (
        interruptible(),
        tempfile.TemporaryDirectory(
            prefix="cospec-ray-", dir=short_directory(), ignore_cleanup_errors=True
        ) as scratch,
    ):  # fmt: skip
        try:
            if address is None:
                _start_ray(cpus, scratch)
            else:
                _join_ray(address)
            yield
        except (CoSpecError, ray.exceptions.RayError) as error:
            if address is None:
                _keep_logs(Path(scratch), logs, say)
            if isinstance(error, CoSpecError):
                raise
            raise TrainingError(f"Ray failed: {said_by(cause_of(error))}") from error
        finally:
            ray.shutdown()


def short_directory() -> str:
    """Return a directory for temporary files whose path leaves Ray's sockets room.

    Raises:
        ConfigError: there is none.
    """
    for directory in (tempfile.gettempdir(), *SHORT_DIRECTORIES):
        if len(os.fsencode(directory)) <= LONGEST_DIRECTORY - len("/cospec-ray-12345678") and os.access(
            directory, os.W_OK | os.X_OK
        ):
            return directory
    raise ConfigError(
        f"TMPDIR: {tempfile.gettempdir()!r} is too long for Ray's sockets, and none of {', '.join(SHORT_DIRECTORIES)} "
        f"is writable; set TMPDIR to a shorter directory"
    )


def require_room(actors: int, cpus: float, gpus: float, say: Callable[[str], None] = lambda text: None) -> None:
    """Compare what engines need with what the cluster offers, before anything waits for it.

    Args:
        actors: how many engines are wanted.
        cpus, gpus: what each needs.
        say: called with a sentence when there is room for some only.

    Raises:
        ConfigError: no node has room for one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(
        min(
            int(node.get(name, 0.0) / wanted + 1e-6) if wanted else actors
            for name, wanted in (("CPU", cpus), ("GPU", gpus))
        )
        for node in nodes
    )
    if fitting >= actors:
        return
    offer = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    if not fitting:
        field = "gpus" if gpus and not any(node.get("GPU", 0) >= gpus for node in nodes) else "cpus"
        raise ConfigError(
            f"rollout.{field}_per_actor: an engine needs {cpus:g} CPUs and {gpus:g} GPUs, and no node offers them "
            f"(there are {offer}); lower it, or set ray_address to another cluster"
        )
    say(
        f"the cluster has room for {fitting} of {actors} engines ({offer}); the others join when there is more: lower "
        f"rollout.actors, or add nodes"
    )


def say_what_others_use(actors: int, cpus: float, gpus: float, say: Callable[[str], None]) -> None:
    """Say so when a cluster is large enough, but what is free of it at the moment is not.

    Args:
        actors, cpus, gpus, say: as for :func:`require_room`.
    """
    free, there = ray.available_resources(), ray.cluster_resources()
    for name, wanted in (("GPU", gpus), ("CPU", cpus)):
        needed, left = min(actors * wanted, there.get(name, 0.0)), free.get(name, 0.0)
        if left < needed - 1e-6:
            say(
                f"{left:g} of the cluster's {there.get(name, 0.0):g} {name}s are free, and {actors} engines need "
                f"{actors * wanted:g}; those without room join when more are free"
            )
            return


def _start_ray(cpus: float, scratch: str) -> None:
    """Start Ray here; again, when its node did not answer within Ray's 30 seconds: the machine may be busy."""
    reason = ""
    for _ in range(START_ATTEMPTS):
        try:
            with interrupts_held_back():  # before it is done Ray does not know what it would have to stop
                ray.init(
                    address="local",
                    num_cpus=max(1, int(-(-cpus // 1))),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=256 * 2**20,
                    runtime_env={"env_vars": _temporary_files(scratch)},
                    _node_ip_address="127.0.0.1",
                    _temp_dir=scratch,
                )
            return
        except Exception as error:  # Ray raises bare Exceptions here
            reason = one_line(error)
    raise ConfigError(
        f"ray_address: Ray does not start on this machine ({reason}); name a running cluster, or try again"
    )


def _temporary_files(scratch: str) -> dict[str, str]:
    """Variables that have actors leave their files where they go with the session: they end without cleaning up.

    What torch compiles is kept for the next one.
    """
    compiled = f"{tempfile.gettempdir()}/torchinductor_cospec_{os.getuid()}"
    return {"TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled)}


def _join_ray(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False)
    except Exception as error:
        reason = one_line(error)
        raise ConfigError(f"ray_address: {address!r} cannot be used ({reason}); is a cluster running there?") from None


def _keep_logs(scratch: Path, logs: Path | None, say: Callable[[str], None]) -> None:
    """Copy the session's logs to where they outlive it."""
    found = scratch / "session_latest" / "logs"
    if not found.is_dir():
        return
    if logs is None:
        logs = Path(tempfile.mkdtemp(prefix="cospec-ray-logs-"))
    with contextlib.suppress(OSError, shutil.Error):  # the error that ends the session is the one to be shown
        shutil.copytree(found, logs, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        say(f"Ray's logs: {logs}")
