"""Modes: the ways of answering that are compared. One grammar everywhere: ``name`` or ``name(key=value, ...)``.

``target`` and ``draft`` are each model alone, ``standard`` is stock speculative decoding. Every other name is a
policy's, with its parameters, and with what a request may set besides: ``cascade(alpha=0.95)``,
``learned(threshold=0.6)``, ``typical(posterior_threshold=0.09, max_overrides=4)``. Several modes are separated by
commas or semicolons.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_cospec.errors import ConfigError, first_sentence, shorten
from vllm_cospec.kernels.policies import AnyPolicy, policy_names
from vllm_cospec.requests import PREFIX, RequestKeys

WITHOUT_COSPEC = ("target", "draft", "standard")
BASELINES = ("greedy", "sampled")
_MODE = re.compile(r"(\w+)(?:\((.*)\))?", re.DOTALL)
_WORD = re.compile(r"(?!true$|false$|null$)[A-Za-z]\w*")
_SEPARATORS = re.compile(r"[;,](?![^()]*\))")
_SETTINGS = {name.removeprefix(PREFIX) for name in RequestKeys.model_fields} - {"policy", "branch"}


@dataclass(frozen=True)
class Mode:
    """One way of answering."""

    name: str  # as a user writes it
    kind: str  # target, draft, standard, or a policy's name
    policy: Any = None  # of a rule: the policy with its parameters
    settings: dict[str, Any] = field(default_factory=dict)  # of its requests: threshold, max_overrides, ...
    temperature: float = 0.0  # 0 is greedy

    @property
    def extra(self) -> dict[str, Any]:
        """The ``cospec_*`` keys of its requests."""
        return {PREFIX + key: value for key, value in self.settings.items()}


def parse_mode(text: str, artefact: bool = True, where: str = "--mode") -> Mode:
    """Read a mode.

    Args:
        text: as a user writes it.
        artefact: whether a trained arbiter is at hand.
        where: the option it stands in, for messages.

    Raises:
        ConfigError: says what is wrong with it.
    """
    text = text.strip()
    match = _MODE.fullmatch(text)
    name = match.group(1) if match else text
    if name not in (*WITHOUT_COSPEC, *policy_names()):
        known = ", ".join([*WITHOUT_COSPEC, *policy_names()])
        raise ConfigError(
            f"{where}: unknown mode {text!r}; known are {known}, with parameters as in cascade(alpha=0.95)"
        )
    parameters = _parameters((match.group(2) if match else None) or "", f"{where}: {text!r}")
    if name in WITHOUT_COSPEC:
        if parameters:
            raise ConfigError(f"{where}: {text!r}: {name} has no parameters; leave out {', '.join(parameters)}")
        return Mode(text, name)
    settings = {key: parameters.pop(key) for key in list(parameters) if key in _SETTINGS}
    _check_settings(name, settings, f"{where}: {text!r}")
    if name == "learned":
        if not artefact:
            raise ConfigError(f"{where}: {text!r} needs a trained arbiter; pass its directory")
        if parameters:
            raise ConfigError(
                f"{where}: {text!r}: learned has no parameter {next(iter(parameters))!r}; its parameters are "
                f"{', '.join(sorted(_SETTINGS))}"
            )
        return Mode(text, name, settings=settings)
    try:
        policy = TypeAdapter(AnyPolicy).validate_python({"policy": name, **parameters})
    except ValidationError as error:
        raise ConfigError(first_sentence(error, f"{where} {text}", hide=policy_names())) from None
    return Mode(text, name, policy, settings)


def split_modes(text: str) -> list[str]:
    """Return the modes of a list, separated by commas or semicolons outside of parentheses; each once."""
    return list(dict.fromkeys(part.strip() for part in _SEPARATORS.split(text) if part.strip()))


def at_temperature(modes: Sequence[Mode], temperature: float, baseline: str) -> list[Mode]:
    """Return the modes at a temperature, and before them the target they are compared with.

    "Better than the target" can mean no more than that sampling and greedy decoding differ; so a comparison at a
    temperature names its baseline.

    Args:
        modes: from :func:`parse_mode`.
        temperature: 0 leaves the modes as they are.
        baseline: ``sampled`` for the target at the same temperature, ``greedy`` for the target's greedy answers.

    Raises:
        ConfigError: there is nothing sampled to compare with.
    """
    if baseline not in BASELINES:
        raise ConfigError(f"--baseline: {baseline!r} is neither {' nor '.join(BASELINES)}")
    if temperature == 0:
        if baseline == "sampled":
            raise ConfigError("--baseline: 'sampled' needs a --temperature above 0")
        return list(modes)
    first = Mode(f"target, {baseline}", "target", temperature=temperature if baseline == "sampled" else 0.0)
    others = [mode for mode in modes if (mode.kind, baseline) != ("target", "sampled")]
    return [first, *(replace(mode, temperature=temperature) for mode in others)]


def _parameters(text: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = (side.strip() for side in part.partition("="))
        if not (key or value):
            continue
        try:
            found[key] = value if _WORD.fullmatch(value) else json.loads(value)
        except ValueError:
            key = ""
        if not key:
            raise ConfigError(f"{where} is not of the form NAME(parameter=value, ...)")
    return found


def _check_settings(name: str, settings: dict[str, Any], where: str) -> None:
    if "threshold" in settings:
        value = settings["threshold"]
        if name != "learned":
            raise ConfigError(f"{where}: threshold is for learned; leave it out")
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ConfigError(f"{where}: threshold must be a number from 0 to 1, got {shorten(value)}")
        settings["threshold"] = float(value)
    try:
        RequestKeys.model_validate({PREFIX + key: value for key, value in settings.items()})
    except ValidationError as error:
        raise ConfigError(first_sentence(error, where)) from None
