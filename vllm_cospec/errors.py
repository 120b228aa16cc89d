"""The errors a user can cause. Each message is one sentence: the field, the value, the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


LONGEST = 480


class CoSpecError(ValueError):
    """Base of every error this package raises on bad input. The message is kept to one line of readable length."""

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        if len(line) > LONGEST:  # what names the field stands first, the way out last
            line = f"{line[: LONGEST - 205]} ... {line[-200:]}"
        super().__init__(line)


class ConfigError(CoSpecError):
    """A setting in ``--speculative-config``, ``cospec.json`` or a request is wrong."""


class ArtefactError(CoSpecError):
    """An arbiter artefact is missing, damaged or made for something else."""


class CompatibilityError(CoSpecError):
    """This vLLM, runner or drafter lacks something arbitration stands on."""


class ServerError(CoSpecError):
    """The server did not come up, or died."""


class TrainingError(CoSpecError):
    """Training cannot go on; the last checkpoint is intact."""


class RewardError(CoSpecError):
    """A reward function threw, hung, or returned no number."""


def one_line(error: Exception) -> str:
    """Return what an exception says, on one line."""
    return " ".join(str(error).split())


def shorten(value: object, limit: int = 80) -> str:
    """Return ``repr(value)`` in at most ``limit`` characters, whatever the value is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer too long to print
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: Exception, limit: int = 300) -> str:
    """Return what a library's exception says, on one line."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def first_sentence(error: ValidationError, where: str, hide: tuple[str, ...] = ()) -> str:
    """Return the first problem of a pydantic error as one sentence: field, what is wrong, value, what is allowed.

    Args:
        error: what pydantic raised.
        where: what the field belongs to, put before its name.
        hide: parts at the second level that are tags of a union, not names a user wrote.
    """
    problem = error.errors(include_url=False)[0]
    parts = [str(part) for depth, part in enumerate(problem["loc"]) if depth != 1 or part not in hide]
    field = ".".join([where, *parts])
    value = shorten(problem.get("input"))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{field}: {message}"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown key (value {value}); remove it or correct its spelling"
    if problem["type"] == "missing":
        return f"{field}: missing; pass it"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"{field}.policy: unknown policy {context['tag']!r}; known policies: {context['expected_tags']}"
    if problem["type"] in ("union_tag_not_found", "model_attributes_type"):
        return f'{field}: {value} names no policy; pass {{"policy": NAME, ...}} or the path of an artefact'
    return f"{field}: {message[:1].lower()}{message[1:]}, got {value}"
