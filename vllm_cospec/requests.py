"""Per-request settings: the ``cospec_*`` keys of ``vllm_xargs`` / ``SamplingParams.extra_args``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

from vllm_cospec.calibration import sampled_otherwise
from vllm_cospec.config import REQUEST_SETTINGS, Scope, Settings
from vllm_cospec.errors import ConfigError, first_sentence
from vllm_cospec.kernels.frozen import Frozen
from vllm_cospec.kernels.reach import ends_of
from vllm_cospec.kernels.regret import MAX_REGRET
from vllm_cospec.scope import UNKNOWN as NO_MARKERS

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

PREFIX = "cospec_"
DECLARES_TOOLS = "cospec_tools"
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
    first_token: int | None = Field(None, ge=0, lt=2**31)
    """Of a sampled response: the token that stands before the first block."""
    generator: bytes | None = None
    """Of a sampled response: state of the request's generator before the first block; on the CPU."""
    reseed: int | None = Field(None, ge=0, lt=2**31)
    """Draw what follows the first block with other random numbers than the response did."""

    @field_validator("generator")
    @classmethod
    def _is_a_state(cls, value: bytes | None) -> bytes | None:
        if value is not None:
            import torch

            try:
                torch.Generator().set_state(torch.frombuffer(bytearray(value), dtype=torch.uint8))
            except (RuntimeError, ValueError, TypeError):
                raise ValueError("is no state of a generator on the CPU; leave it out") from None
        return value


class RequestKeys(Frozen):
    """What a request may set."""

    cospec_policy: str | None = Field(None)
    """"strict" switches arbitration off; the server's own policy switches it on where it is off by default."""
    cospec_threshold: float | None = Field(None, ge=0, le=1)
    """Threshold of the trained arbiter; not below the server's."""
    cospec_max_overrides: int | None = Field(None, ge=0, le=2**31 - 1)
    """Overrides allowed in this request."""
    cospec_max_regret: float | None = Field(None, ge=0, le=MAX_REGRET)
    """Nats that the overrides of this response give up at most; 0 is strict."""
    cospec_exact_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    """The first so many output tokens are verified strictly."""
    cospec_scope: Scope | None = None
    """Where drafts may be kept: in all of the response, while the model thinks, or in its answer."""
    cospec_tools: int = Field(0, ge=0, le=1)
    """1: the request declares tools, and is strict unless it names the policy; the server sets it."""
    cospec_branch: Branch | None = None
    """Training: continue a response that was begun elsewhere."""


@dataclass(frozen=True)
class RequestSettings:
    """What holds for one request."""

    arbitrated: bool
    threshold: float
    max_overrides: int | None
    exact_tokens: int
    max_regret: float | None = None  # nats
    scope: Scope = "all"
    branch: Branch | None = None


def check_keys(extra_args: Mapping[str, Any] | None, settings: Settings) -> RequestKeys:
    """Return the keys of a request that are ours, checked against what this server serves.

    Args:
        extra_args: ``vllm_xargs`` as written, or ``SamplingParams.extra_args``; keys of others are left alone.
        settings: of the server.

    Raises:
        ConfigError: one sentence; the API server answers it with status 400.
    """
    keys = _parse({key: value for key, value in (extra_args or {}).items() if key.startswith(PREFIX)})
    for name in REQUEST_SETTINGS:
        value = getattr(keys, f"{PREFIX}{name}")
        if value is not None and name not in settings.request_settings:
            raise ConfigError(
                f"{WHERE}.{PREFIX}{name}: {value!r} is not for a request to set on this server (request_settings); "
                f"leave it out"
            )
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
    regret, limit = keys.cospec_max_regret, settings.max_regret
    if regret is not None and limit is not None and regret > limit:
        raise ConfigError(f"{WHERE}.cospec_max_regret: {regret:g} is more than this server's {limit:g}; ask for less")
    threshold = keys.cospec_threshold
    if threshold is not None and threshold < settings.least_threshold:
        raise ConfigError(
            f"{WHERE}.cospec_threshold: {threshold:g} is below this server's {settings.least_threshold:g}; ask for no "
            f"less"
        )
    if keys.cospec_scope not in (None, "all") and settings.thinking_tokens is None:
        raise ConfigError(f"{WHERE}.cospec_scope: {keys.cospec_scope!r} {NO_MARKERS}")
    if keys.cospec_branch is not None and not settings.collect:
        raise ConfigError(
            f"{WHERE}.cospec_branch: is for training, on an engine that was started with collect; leave it out"
        )
    return keys


def request_settings(params: SamplingParams | None, settings: Settings) -> RequestSettings:
    """Combine a request's keys with the server's settings.

    Raises:
        ConfigError: see :func:`check_keys`; or the request samples otherwise than was calibrated, and that is refused.
    """
    keys = check_keys(params.extra_args if params is not None else None, settings)
    check_sampling(params, settings)
    return RequestSettings(
        arbitrated=_arbitrated(params, settings),
        threshold=settings.threshold if keys.cospec_threshold is None else keys.cospec_threshold,
        max_overrides=settings.max_overrides if keys.cospec_max_overrides is None else keys.cospec_max_overrides,
        max_regret=settings.max_regret if keys.cospec_max_regret is None else keys.cospec_max_regret,
        exact_tokens=settings.exact_tokens if keys.cospec_exact_tokens is None else keys.cospec_exact_tokens,
        scope=keys.cospec_scope or settings.scope,
        branch=keys.cospec_branch,
    )


def keep_strict(request: EngineCoreRequest, speculative_config: Any) -> None:
    """Write into a request on its way to the engine that it is strict, where the drafter does not see what it asks.

    With a LoRA adapter it drafts as the target would without, which a request may accept by naming the policy. A prompt
    of embeddings, or an image that only the target can see, it does not have at all. Where input comes in parts, vLLM
    takes back the last token before each part, of which a head's cache is made already.

    Raises:
        ConfigError: the request names the policy where the drafter lacks a part of the prompt.
    """
    assert request.sampling_params is not None
    named = (request.sampling_params.extra_args or {}).get("cospec_policy")
    unseen = None
    if request.prompt_embeds is not None:
        unseen = "a prompt of embeddings"
    elif request.mm_features and _reads_text_alone(speculative_config):
        unseen = "an image or sound"
    elif request.resumable:
        unseen = "where input that comes in parts goes on"
    if unseen and named not in (None, "strict"):
        raise ConfigError(f"{WHERE}.cospec_policy: {named!r} needs a drafter that sees {unseen}; leave it out")
    if unseen or (request.lora_request is not None and named is None):
        request.sampling_params.extra_args = {
            **(request.sampling_params.extra_args or {}),
            "cospec_policy": "strict",
        }


def _reads_text_alone(speculative_config: Any) -> bool:
    """Whether the drafter is a model of its own without the target's encoders; a head reads the target's states."""
    method, draft = speculative_config.method, speculative_config.draft_model_config
    return method == "draft_model" and not draft.is_multimodal_model


def check_sampling(params: SamplingParams | None, settings: Settings) -> str | None:
    """Compare how an arbitrated request samples with what the arbiter was calibrated for.

    Returns:
        As a clause, what it samples otherwise; None for nothing, or where nothing was calibrated.

    Raises:
        ConfigError: that is refused here.
    """
    conditions = settings.calibrated.conditions
    if params is None or conditions is None or not _arbitrated(params, settings):
        return None
    otherwise = sampled_otherwise(conditions, params.temperature, params.top_p)
    if otherwise is not None and settings.calibrated.refuse:
        raise ConfigError(
            f"{otherwise}, and this server keeps to what was calibrated; ask for that, or for cospec_policy='strict' "
            f"in {WHERE}"
        )
    return otherwise


def _arbitrated(params: SamplingParams | None, settings: Settings) -> bool:
    """Whether the policy is consulted at all: structured output and tools are strict unless they name the policy."""
    extra = (params.extra_args or {}) if params is not None else {}
    exact = extra.get(DECLARES_TOOLS) or (params is not None and params.structured_outputs is not None)
    return (extra.get("cospec_policy") or ("strict" if exact else settings.policy.policy)) != "strict"


def served_settings(params: SamplingParams | None, settings: Settings) -> RequestSettings:
    """Return what a runner serves a request with.

    Bad keys are refused at the front end; a request that reaches a runner another way is served strictly.
    """
    try:
        return request_settings(params, settings)
    except ConfigError:
        return RequestSettings(arbitrated=False, threshold=1.0, max_overrides=0, exact_tokens=0)


def response_ends(params: SamplingParams | None, branch: Branch | None, room: int) -> list[int]:
    """Return what ends a response, as :func:`vllm_cospec.kernels.reach.ends_of` puts it.

    Args:
        params: of the request.
        branch: what the request goes on with, if anything.
        room: tokens that the model's length leaves it.
    """
    written = branch.written if branch is not None else 0
    if params is None:
        return ends_of(room + written, [])
    length = room if params.max_tokens is None else min(room, params.max_tokens)
    own = set(params.stop_token_ids or ())
    return ends_of(length + written, sorted(own if params.eos_token_id is None else own | {params.eos_token_id}))


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
            message += f"; known keys are {', '.join(PREFIX + name for name in REQUEST_SETTINGS)}"
        raise ConfigError(message) from None
