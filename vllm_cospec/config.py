"""Settings: what a user may write in ``--speculative-config`` and ``cospec.json``, and what the engine gets.

:func:`resolve` splits the user's keys from vLLM's own and fills in the recipe; :func:`settle` checks the result
against the target and drafter vLLM has loaded, and yields the :class:`Settings` that travel to the workers.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_cospec.errors import ConfigError, first_sentence, shorten
from vllm_cospec.kernels.policies import AnyPolicy, Fly, Learned, Policy, policy_names

METHOD = "cospec"
RECIPE_FILE = "cospec.json"
MAX_RECIPE_BYTES = 2**20
WHERE = "speculative_config"

DRAFT_METHODS: dict[str, bool] = {
    "draft_model": True,
    "eagle": True,
    "eagle3": True,
    "mtp": True,
    "ngram": False,
    "suffix": False,
}
"""Inner methods arbitration works with, and whether their drafts come with logits."""


class CoSpecConfig(BaseModel):
    """The keys of ``--speculative-config`` that are this package's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    arbiter: AnyPolicy | None = None
    """Who decides at a mismatch: the directory or hub id of a trained arbiter, or {"policy": NAME, ...parameters}."""
    draft_method: str | None = Field(None, strict=True)
    """vLLM's method for the drafter (draft_model, eagle, eagle3, mtp, ngram, suffix); left out: what vLLM detects."""
    threshold: float | None = Field(None, ge=0, le=1, strict=True)
    """Learned policy: keep the draft when the score exceeds it; left out: the artefact's."""
    max_accuracy_loss: float | None = Field(None, gt=0, le=1, strict=True)
    """Learned policy, instead of threshold: bound of the loss, at 95 % confidence, on the artefact's calibration."""
    max_overrides: int | None = Field(None, ge=0, le=2**31 - 1, strict=True)
    """Overrides allowed per request; further mismatches are strict. Left out: no limit."""
    exact_tokens: int = Field(0, ge=0, le=2**31 - 1, strict=True)
    """The first so many output tokens of every response are verified strictly."""
    collect: bool = Field(False, strict=True)
    """Record every decision for training."""

    @field_validator("arbiter", mode="before")
    @classmethod
    def _artefact_by_name(cls, value: Any) -> Any:
        """A plain string is short for the learned policy with that artefact."""
        return {"policy": "learned", "artefact": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> CoSpecConfig:
        if self.threshold is not None and self.max_accuracy_loss is not None:
            raise ValueError("threshold and max_accuracy_loss exclude each other; pass one of them")
        if isinstance(self.arbiter, Policy) and not isinstance(self.arbiter, Learned):
            for name in ("threshold", "max_accuracy_loss"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is for a trained arbiter, not for policy {self.arbiter.policy!r}; remove it"
                    )
        if self.draft_method is not None and self.draft_method not in DRAFT_METHODS:
            raise ValueError(
                f"draft_method {self.draft_method!r} is not supported; choose from {', '.join(DRAFT_METHODS)}"
            )
        return self


OWN_KEYS = frozenset(CoSpecConfig.model_fields)


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

    @property
    def lossy(self) -> bool:
        """Whether output can differ from the target's own."""
        return self.policy.policy != "strict"

    def announcement(self) -> str:
        """Return the one line that tells an operator what is on."""
        if not self.lossy:
            return "CoSpec: policy strict, output is exactly that of the target."
        if isinstance(self.policy, Learned):
            what = f"policy learned, threshold {self.threshold:g}, arbiter {self.policy.artefact}"
        else:
            what = f"policy {self.policy.describe()}"
        return (
            f"CoSpec verification is LOSSY: draft tokens the target would reject may be kept ({what}). "
            f"Output can differ from the target's own; requests switch it off with cospec_policy=strict."
        )


def asked_for(speculative_config: Any) -> bool:
    """Return whether a user's speculative configuration asks for this plugin."""
    return isinstance(speculative_config, dict) and speculative_config.get("method") == METHOD


def resolve(raw: dict[str, Any], target: str, engine_keys: frozenset[str]) -> tuple[CoSpecConfig, dict[str, Any]]:
    """Split a user's keys into this package's and vLLM's, filling what is left out from the recipe.

    Args:
        raw: ``--speculative-config`` as parsed, with ``method`` "cospec". Not changed.
        target: the target model, a directory or hub id.
        engine_keys: the names vLLM's SpeculativeConfig knows.

    Returns:
        The configuration with ``arbiter`` turned into a policy, and the keyword arguments for vLLM.

    Raises:
        ConfigError: one sentence naming the field, the value and the way out.
    """
    explicit: dict[str, Any] = {}
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name in explicit:
            raise ConfigError(f"{WHERE}.{name}: given twice, with dashes and with underscores; leave one out")
        explicit[name] = value
    explicit.pop("method", None)
    _refuse_unknown(explicit, engine_keys, WHERE)
    merged = _load_recipe(target, engine_keys) | explicit
    knobs = {"threshold", "max_accuracy_loss"}
    if explicit.keys() & (
        knobs | {"arbiter"}
    ):  # the recipe's knob belongs to its own arbiter, and there is only one knob
        for key in knobs - explicit.keys():
            merged.pop(key, None)
    try:
        config = CoSpecConfig.model_validate({key: value for key, value in merged.items() if key in OWN_KEYS})
    except ValidationError as error:
        raise ConfigError(first_sentence(error, WHERE, hide=policy_names())) from None
    inner = {key: value for key, value in merged.items() if key not in OWN_KEYS}
    if config.arbiter is None:
        raise ConfigError(
            f"{WHERE}.arbiter: missing, and {target!r} has no {RECIPE_FILE} that names one; pass the path of an "
            f'artefact or {{"policy": NAME}} with NAME from {", ".join(policy_names())}'
        )
    policy = config.arbiter
    if isinstance(policy, Learned):
        policy = Learned(artefact=str(locate_artefact(policy.artefact)))
    _check_inner(config, inner, target)
    return config.model_copy(update={"arbiter": policy}), inner


def _refuse_unknown(keys: dict[str, Any], engine_keys: frozenset[str], where: str) -> None:
    for key, value in keys.items():
        if key not in OWN_KEYS and key not in engine_keys:
            close = difflib.get_close_matches(key, [*OWN_KEYS, *engine_keys], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"remove it; own keys are {', '.join(sorted(OWN_KEYS))}"
            raise ConfigError(f"{where}.{key}: unknown key (value {shorten(value)}); {hint}")


def _check_inner(config: CoSpecConfig, inner: dict[str, Any], target: str) -> None:
    """Complete and check vLLM's own keys where vLLM's message would come late or from deep inside."""
    if config.draft_method is not None:
        inner["method"] = config.draft_method
    model, count = inner.get("model"), inner.get("num_speculative_tokens")
    if model is None and config.draft_method in (None, "draft_model", "eagle", "eagle3"):
        raise ConfigError(
            f"{WHERE}.model: missing, and {target!r} has no {RECIPE_FILE} that names a draft model; "
            f'pass "model": DRAFT, or "draft_method": "ngram" to draft without one'
        )
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"{WHERE}.model: must be a path or hub id, got {shorten(model)}")
    if model is not None and _looks_local(model) and not _exists(Path(model) / "config.json"):
        raise ConfigError(
            f"{WHERE}.model: no model at {model!r} (config.json is missing); pass a model directory or hub id"
        )
    if model is not None and _looks_local(model):
        try:
            described = isinstance(json.loads((Path(model) / "config.json").read_bytes()), dict)
        except (OSError, ValueError, RecursionError):
            described = False
        if not described:
            raise ConfigError(f"{WHERE}.model: config.json at {model!r} is no JSON object; copy the model again")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 128):
        raise ConfigError(f"{WHERE}.num_speculative_tokens: must be an integer from 1 to 128, got {shorten(count)}")
    if count is None and config.draft_method not in ("mtp", "suffix"):
        raise ConfigError(
            f"{WHERE}.num_speculative_tokens: missing; pass the number of draft tokens per step, for example 5"
        )
    for key, only in (
        ("rejection_sample_method", "standard"),
        ("use_heterogeneous_vocab", False),
        ("enable_adaptive_verification", False),
    ):
        if inner.get(key, only) != only:
            raise ConfigError(f"{WHERE}.{key}: {shorten(inner[key])} cannot be combined with cospec; leave it out")


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or "\0" in path or path.count("/") != 1


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, null bytes, a loop of links
        return False


def _load_recipe(target: str, engine_keys: frozenset[str]) -> dict[str, Any]:
    """Return the recipe that lies beside the target, with its paths made absolute; empty when there is none."""
    path, local = _find_beside(target, RECIPE_FILE)
    if path is None:
        return {}
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; this is no recipe")
        recipe = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not readable as JSON ({error}); mend it, or pass every key explicitly") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got {type(recipe).__name__}")
    recipe.pop("method", None)
    _refuse_unknown(recipe, engine_keys, str(path))

    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or "\0" in value:
            return value
        if not local and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ConfigError(f"{path}: {value!r} leaves the repository; a downloaded recipe may not do that")
        beside = path.parent / value
        if not local:  # so far only the recipe has been downloaded
            inside = os.path.normpath(value)
            with contextlib.suppress(Exception):  # no such folder there: a hub id
                from huggingface_hub import snapshot_download

                beside = Path(snapshot_download(target, allow_patterns=[f"{inside}/*"])) / inside
        return os.path.abspath(beside) if value.startswith(".") or _is_directory(beside) else value

    if "model" in recipe:
        recipe["model"] = absolute(recipe["model"])
    arbiter = recipe.get("arbiter")
    if isinstance(arbiter, dict) and "artefact" in arbiter:
        recipe["arbiter"] = {**arbiter, "artefact": absolute(arbiter["artefact"])}
    elif arbiter is not None:
        recipe["arbiter"] = absolute(arbiter)
    return recipe


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _find_beside(target: str, name: str) -> tuple[Path | None, bool]:
    """Return the file ``name`` of a model directory or repository, and whether it is a local directory."""
    if _is_directory(Path(target)):
        path = Path(target) / name
        return (path if _exists(path) else None), True
    if _looks_local(target):
        return None, True
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(target, name)), False
    except (HfHubHTTPError, OSError, ValueError):  # not there, offline, or not a repository: no recipe
        return None, False


def locate_artefact(reference: str) -> Path:
    """Return the local directory of an arbiter given by path or hub id.

    Raises:
        ConfigError: nothing there.
    """
    if not reference:
        raise ConfigError(f"{WHERE}.arbiter: empty; pass an artefact's directory or hub id")
    path = Path(os.path.expanduser(reference))
    if _is_directory(path):
        return path.resolve()
    if _looks_local(reference) or _exists(path):
        known = ", ".join(policy_names())
        hint = f'; for a rule write {{"policy": {reference!r}}}' if reference in known else ""
        raise ConfigError(
            f"{WHERE}.arbiter: no directory at {reference!r}{hint}; pass an artefact's directory or hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=["config.json", "model.safetensors", "README.md"]))
    except Exception as error:  # the hub client raises many unrelated types; all mean the same to a user
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"{WHERE}.arbiter: {reference!r} is neither a directory nor a hub id that can be fetched ({reason})"
        ) from None


def settle(
    config: CoSpecConfig,
    method: str,
    num_speculative_tokens: int,
    target_vocab_size: int,
    draft_vocab_size: int,
    target_vocabulary: Any,
    counters: str,
) -> Settings:
    """Check a configuration against what vLLM made of it.

    Args:
        config: from :func:`resolve`; ``arbiter`` is a policy.
        method: the inner method vLLM settled on.
        num_speculative_tokens: K.
        target_vocab_size, draft_vocab_size: as the models' configurations say.
        target_vocabulary: called without arguments, returns the target tokenizer's dict of token to id.
        counters: directory for the counters.

    Raises:
        ConfigError, ArtefactError: one sentence.
    """
    policy = config.arbiter
    assert isinstance(policy, Policy)
    if method not in DRAFT_METHODS:
        raise ConfigError(
            f"{WHERE}.draft_method: vLLM detected {method!r}, which arbitration does not support; "
            f"choose a drafter of kind {', '.join(DRAFT_METHODS)}"
        )
    draft_logits = DRAFT_METHODS[method]
    if method == "draft_model" and draft_vocab_size != target_vocab_size:
        raise ConfigError(
            f"{WHERE}.model: the draft has a vocabulary of {draft_vocab_size} tokens, the target of "
            f"{target_vocab_size}; use a draft with the target's tokenizer"
        )
    if policy.needs_draft_logits and not draft_logits:
        raise ConfigError(
            f"{WHERE}.arbiter: policy {policy.policy!r} needs draft logits, and drafter {method!r} has none"
        )
    threshold = 0.5
    if isinstance(policy, Fly):
        window = policy.window or min(6, num_speculative_tokens - 1)
        if not 1 <= window < num_speculative_tokens:
            raise ConfigError(
                f"{WHERE}.arbiter.window: {policy.window} does not fit "
                f"num_speculative_tokens={num_speculative_tokens}; fly needs 1 <= window < num_speculative_tokens"
            )
        policy = policy.model_copy(update={"window": window})
    if isinstance(policy, Learned):
        threshold = _settle_learned(config, policy, draft_logits, target_vocab_size, target_vocabulary)
    elif config.threshold is not None or config.max_accuracy_loss is not None:
        raise ConfigError(f"{WHERE}.threshold: is for a trained arbiter, not for policy {policy.policy!r}; remove it")
    return Settings(
        policy=policy,
        threshold=threshold,
        max_overrides=config.max_overrides,
        exact_tokens=config.exact_tokens,
        collect=config.collect,
        draft_logits=draft_logits,
        num_speculative_tokens=num_speculative_tokens,
        counters=counters,
    )


def _settle_learned(
    config: CoSpecConfig, policy: Learned, draft_logits: bool, vocab_size: int, vocabulary: Any
) -> float:
    from vllm_cospec.arbiter import calibrated_threshold, check_fit, load_artefact, tokenizer_hash

    _, artefact = load_artefact(Path(policy.artefact))
    check_fit(artefact, policy.artefact, draft_logits, vocab_size, tokenizer_hash(vocabulary()))
    if config.max_accuracy_loss is not None:
        return calibrated_threshold(artefact, policy.artefact, config.max_accuracy_loss)
    return artefact.threshold if config.threshold is None else config.threshold
