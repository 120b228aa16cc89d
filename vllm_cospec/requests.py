"""Per-request settings: the ``cospec_*`` keys of ``vllm_xargs`` / ``SamplingParams.extra_args``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from vllm_cospec.config import Settings
from vllm_cospec.errors import ConfigError, first_sentence
from vllm_cospec.kernels.frozen import Frozen

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

PREFIX = "cospec_"
WHERE = "vllm_xargs"


class Branch(Frozen):
    """Where a response goes on that was begun by another request; for training, on an engine that collects.

    The tokens it has so far stand at the end of the prompt. Mismatches before ``decided_at`` are kept: they lie in one
    block, which otherwise would have ended before it.
    """

    written: int = Field(ge=0, lt=2**30)
    """How many tokens of the response stand in the prompt."""
    overrides: int = Field(ge=0, lt=2**30)
    """Overrides made among them."""
    decided_at: int = Field(ge=0, lt=2**30)
    """Index in the response of the mismatch that is decided by ``keep``."""
    keep: bool
    """Whether its draft token is kept."""


class RequestKeys(Frozen):
    """What a request may set."""

    cospec_policy: str | None = Field(None)
    """"strict" switches arbitration off; the server's own policy switches it on where it is off by default."""
    cospec_threshold: float | None = Field(None, ge=0, le=1)
    """Threshold of the trained arbiter."""
    cospec_max_overrides: int | None = Field(None, ge=0, le=2**31 - 1)
    """Overrides allowed in this request."""
    cospec_exact_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    """The first so many output tokens are verified strictly."""
    cospec_branch: Branch | None = None
    """Training: continue a response that was begun elsewhere."""


@dataclass(frozen=True)
class RequestSettings:
    """What holds for one request."""

    arbitrated: bool
    threshold: float
    max_overrides: int | None
    exact_tokens: int
    branch: Branch | None = None


def request_settings(params: SamplingParams | None, settings: Settings) -> RequestSettings:
    """Combine a request's keys with the server's settings.

    Raises:
        ConfigError: one sentence; the API server answers it with status 400.
    """
    extra = (params.extra_args if params is not None else None) or {}
    own: dict[str, Any] = {key: value for key, value in extra.items() if key.startswith(PREFIX)}
    keys = _parse(own)
    server = settings.policy.policy
    if keys.cospec_policy not in (None, "strict", server):
        raise ConfigError(
            f"{WHERE}.cospec_policy: {keys.cospec_policy!r} is not served here; "
            f"pass 'strict'{'' if server == 'strict' else f' or {server!r}'}"
        )
    if keys.cospec_threshold is not None and settings.policy.arbiter is None:
        raise ConfigError(
            f"{WHERE}.cospec_threshold: {keys.cospec_threshold!r} is for a trained arbiter, "
            f"and this server runs policy {server!r}; leave it out"
        )
    if keys.cospec_branch is not None and not settings.collect:
        raise ConfigError(
            f"{WHERE}.cospec_branch: is for training, on an engine that was started with collect; leave it out"
        )
    structured = params is not None and params.structured_outputs is not None
    wanted = keys.cospec_policy or ("strict" if structured else server)
    return RequestSettings(
        arbitrated=wanted != "strict",
        threshold=settings.threshold if keys.cospec_threshold is None else keys.cospec_threshold,
        max_overrides=settings.max_overrides if keys.cospec_max_overrides is None else keys.cospec_max_overrides,
        exact_tokens=settings.exact_tokens if keys.cospec_exact_tokens is None else keys.cospec_exact_tokens,
        branch=keys.cospec_branch,
    )


def served_settings(params: SamplingParams | None, settings: Settings) -> RequestSettings:
    """Return what a runner serves a request with.

    Bad keys are refused at the front end; a request that reaches a runner another way is served strictly.
    """
    try:
        return request_settings(params, settings)
    except ConfigError:
        return RequestSettings(arbitrated=False, threshold=1.0, max_overrides=0, exact_tokens=0)


def action_coin(seed: int, output_position: int) -> float:
    """Return the number in [0, 1) a sampled action is compared with: the same for one seed and place in a response.

    What else is in the batch, and whether the response was begun by another request, does not matter.
    """
    digest = hashlib.blake2b(f"{seed}/{output_position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _parse(own: dict[str, Any]) -> RequestKeys:
    try:
        return RequestKeys.model_validate(own)
    except ValidationError as error:
        message = first_sentence(error, WHERE)
        if error.errors()[0]["type"] == "extra_forbidden":
            message += f"; known keys are {', '.join(RequestKeys.model_fields)}"
        raise ConfigError(message) from None
