"""The keys: what a user may write in ``--speculative-config`` and ``cospec.json``, and what a worker gets of it.

From the one to the other: ``recipe`` fills in what was left out, ``translate`` builds vLLM's configuration, ``settle``
checks the keys against the models it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from vllm_cospec.calibration import STRICT_THRESHOLD, Conditions
from vllm_cospec.drift import Traffic
from vllm_cospec.kernels.frozen import Frozen
from vllm_cospec.kernels.policies import AnyPolicy, Policy
from vllm_cospec.kernels.regret import MAX_REGRET, in_units

METHOD = "cospec"
WHERE = "speculative_config"

DRAFT_METHODS: dict[str, bool] = {
    "draft_model": True,
    "eagle": True,
    "eagle3": True,
    "mtp": True,
    "dflash": True,
    "dspark": True,
    "ngram": False,
    "suffix": False,
}
"""Inner methods arbitration works with, and whether their drafts come with logits."""


RequestSetting = Literal["policy", "threshold", "max_overrides", "max_regret", "exact_tokens", "scope"]
Scope = Literal["all", "thinking", "answer"]
REQUEST_SETTINGS: tuple[RequestSetting, ...] = get_args(RequestSetting)
"""What a request may change unless the operator says otherwise."""


class CoSpecConfig(Frozen):
    """The keys of ``--speculative-config`` that are this package's own."""

    arbiter: AnyPolicy | None = None
    """Who decides at a mismatch: the directory or hub id of a trained arbiter, or {"policy": NAME, ...parameters}."""
    draft_method: str | None = Field(None)
    """vLLM's method for the drafter (draft_model, eagle, eagle3, mtp, dflash, dspark, ngram, suffix); left out: what
    vLLM detects."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Learned policy: keep the draft when the score exceeds it, and no request may ask for a lower one; left out: the
    artefact's."""
    max_accuracy_loss: float | None = Field(None, gt=0, le=1)
    """Learned policy, instead of threshold: the fastest one whose calibration bounds the loss by this, at its level."""
    on_mismatch: Literal["warn", "refuse"] = "warn"
    """Learned policy, served otherwise than calibrated (draft, K, dtype, chat template, a request's temperature or
    top_p): say so, or refuse. With max_accuracy_loss always refused: the bound would not hold."""
    on_drift: Literal["log", "strict"] = "log"
    """Learned policy, when requests no longer look like those of calibration: say so, or verify strictly."""
    drift_pause: int | None = Field(None, ge=1, le=2**31 - 1)
    """With on_drift strict: requests after which arbitration comes back. Left out: not before a restart."""
    max_overrides: int | None = Field(None, ge=0, le=2**31 - 1)
    """Overrides allowed per request; further mismatches are strict. Left out: no limit."""
    max_regret: float | None = Field(None, ge=0, le=MAX_REGRET)
    """Nats that the overrides of a response give up at most: the sum of log p(t*) - log p(d); 0 is strict. Left out: no
    limit."""
    exact_tokens: int = Field(0, ge=0, le=2**31 - 1)
    """The first so many output tokens of every response are verified strictly."""
    scope: Scope = "all"
    """Where drafts may be kept: in all of a response, while the model thinks, or in its answer."""
    thinking_tokens: tuple[int, int] | None = Field(None, strict=False)
    """Ids of the tokens that begin and end thinking; left out: those of vLLM's reasoning parser."""
    request_settings: tuple[RequestSetting, ...] = Field(REQUEST_SETTINGS, strict=False)
    """What requests may change by their cospec_* keys: policy, threshold, max_overrides, max_regret, exact_tokens,
    scope; none of them is a list without entries."""
    collect: bool = Field(False)
    """Record every decision for training."""

    @field_validator("arbiter", mode="before")
    @classmethod
    def _artefact_by_name(cls, value: Any) -> Any:
        """A plain string is short for the learned policy with that artefact."""
        return {"policy": "learned", "artefact": value} if isinstance(value, str) else value

    @field_validator("thinking_tokens")
    @classmethod
    def _two_tokens(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and (min(value) < 0 or value[0] == value[1]):
            raise ValueError("must be two different token ids; the first begins thinking")
        return value

    @model_validator(mode="after")
    def _check(self) -> CoSpecConfig:
        if self.threshold is not None and self.max_accuracy_loss is not None:
            raise ValueError("threshold and max_accuracy_loss exclude each other; pass one of them")
        if isinstance(self.arbiter, Policy) and self.arbiter.arbiter is None:
            for name, value in (
                ("threshold", self.threshold),
                ("max_accuracy_loss", self.max_accuracy_loss),
                ("on_mismatch", None if self.on_mismatch == "warn" else self.on_mismatch),
                ("on_drift", None if self.on_drift == "log" else self.on_drift),
            ):
                if value is not None:
                    raise ValueError(
                        f"{name} is for a trained arbiter, not for policy {self.arbiter.policy!r}; remove it"
                    )
        if self.drift_pause is not None and self.on_drift != "strict":
            raise ValueError("drift_pause is for on_drift 'strict'; remove it")
        if self.draft_method is not None and self.draft_method not in DRAFT_METHODS:
            raise ValueError(
                f"draft_method {self.draft_method!r} is not supported; choose from {', '.join(DRAFT_METHODS)}"
            )
        return self


OWN_KEYS = frozenset(CoSpecConfig.model_fields)


@dataclass(frozen=True)
class Calibrated:
    """What a trained arbiter's calibration says about what is served; the defaults stand for nothing."""

    conditions: Conditions | None = None  # what it was made for
    refuse: bool = False  # requests that sample otherwise
    differences: tuple[str, ...] = ()  # what is served otherwise, as clauses


@dataclass(frozen=True)
class Settings:
    """Everything a worker needs to know, resolved and checked. Rides on vLLM's SpeculativeConfig as ``.cospec``."""

    policy: Policy
    threshold: float  # of the learned policy; 0.5 and unused otherwise
    max_overrides: int | None
    exact_tokens: int
    collect: bool
    draft_logits: bool  # whether the drafter has logits
    num_speculative_tokens: int
    counters: str  # directory of the counters, see vllm_cospec.metrics
    max_regret: float | None = None  # nats
    request_settings: tuple[str, ...] = REQUEST_SETTINGS  # what a request may change
    scope: Scope = "all"
    thinking_tokens: tuple[int, int] | None = None  # that begin and end thinking; None: not known
    calibrated: Calibrated = Calibrated()  # what is known of it
    traffic: Traffic | None = None  # what calibration saw of requests with just these settings; None: not watched
    on_drift: Literal["log", "strict"] = "log"
    drift_pause: int | None = None
    per_request: bool = False  # vLLM counts speculative decoding per request

    @property
    def reads_draft_logits(self) -> bool:
        """Whether the drafter has logits, and somebody looks at them."""
        return self.draft_logits and (self.collect or self.policy.looks_at_draft)

    @property
    def counts_requests(self) -> bool:
        """Whether anybody asks what was counted of a request: its response, histograms, or the drift test."""
        return self.per_request or self.traffic is not None

    @property
    def counts_scores(self) -> bool:
        """Whether an arbiter's scores are among it."""
        return self.counts_requests and self.policy.arbiter is not None

    @property
    def least_threshold(self) -> float:
        """What a request's threshold is not below: the served one, but where decisions are collected for training."""
        return 0.0 if self.collect else self.threshold

    @property
    def lossy(self) -> bool:
        """Whether output can differ from the target's own."""
        return self._exact_because is None

    @property
    def _exact_because(self) -> str | None:
        """What makes output exactly the target's, whatever requests ask for; None for nothing."""
        if self.policy.policy == "strict":
            return "policy strict"
        if in_units(self.max_regret) == 0:
            return "max_regret 0"
        if self.policy.arbiter is not None and self.least_threshold >= STRICT_THRESHOLD:
            return f"arbiter {self.policy.arbiter} at threshold {self.threshold:g}, which no score exceeds"
        return None

    def described(self) -> dict[str, Any]:
        """Return what a monitor, or a trainer that must not roll out with a lossy verifier, wants to know."""
        learned = self.policy.arbiter is not None
        return {
            "lossy": self.lossy,
            "policy": self.policy.policy,
            "arbiter": self.policy.arbiter,
            "threshold": self.threshold if learned else None,
            "max_overrides": self.max_overrides,
            "max_regret": self.max_regret,
            "exact_tokens": self.exact_tokens,
            "scope": self.scope,
            "request_settings": list(self.request_settings),
            "on_drift": self.on_drift if self.traffic is not None else None,
            "num_speculative_tokens": self.num_speculative_tokens,
        }

    def announcement(self) -> str:
        """Return the one line that tells an operator what is on."""
        if self._exact_because is not None:
            return f"CoSpec: {self._exact_because}, output is exactly that of the target."
        if self.policy.arbiter is not None:
            what = f"policy {self.policy.policy}, threshold {self.threshold:g}, arbiter {self.policy.arbiter}"
        else:
            what = f"policy {self.policy.describe()}"
        if self.max_regret is not None:
            what += f", within a regret of {self.max_regret:g} nats per response"
        if self.scope != "all":
            what += f", only in the {'thinking' if self.scope == 'thinking' else 'answer'}"
        otherwise = "; ".join(self.calibrated.differences)
        return (
            f"CoSpec verification is LOSSY: draft tokens the target would reject may be kept ({what}). "
            f"Output can differ from the target's own; requests switch it off with cospec_policy=strict."
            + (f" Its calibration says nothing here: it was made for something else ({otherwise})." * bool(otherwise))
        )


def names_us(method: Any) -> bool:
    """Return whether a method is this plugin's, in whatever letters: vLLM would answer with a list that lacks it."""
    return isinstance(method, str) and method.strip().lower() == METHOD


def asked_for(speculative_config: Any) -> bool:
    """Return whether a user's speculative configuration asks for this plugin."""
    return isinstance(speculative_config, dict) and names_us(speculative_config.get("method"))
