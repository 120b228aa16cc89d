"""A Ray session: a cluster that is joined, or one on this machine that ends with the block."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator

import ray

from vllm_cospec.errors import ConfigError, one_line
from vllm_cospec.server import interruptible

START_ATTEMPTS = 3


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
            reason = one_line(error)
    raise ConfigError(
        f"ray_address: Ray does not start on this machine ({reason}); name a running cluster, or try again"
    )


def _join_ray(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False)
    except Exception as error:
        reason = one_line(error)
        raise ConfigError(f"ray_address: {address!r} cannot be used ({reason}); is a cluster running there?") from None
