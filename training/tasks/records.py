"""Reading problems: a line or a record of a user's data, and what is wrong with it by its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from vllm_cospec.errors import ConfigError, shorten
from vllm_cospec.training.tasks import answers
from vllm_cospec.training.tasks.protocol import Problem

AnswerFormat = Literal["auto", "plain", "gsm8k", "boxed"]
BadLines = Literal["refuse", "leave_out"]
MARK = "####"  # before the result in GSM8K's answers


class BadRecordError(Exception):
    """A record that is no problem; says why."""


class _Number(str):
    """A JSON number as it is written."""


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, JSON value or what is wrong with the line) of each line of a JSONL file that is not empty.

    The file is UTF-8, with or without a byte-order mark, plain or compressed (``.gz``).

    Raises:
        ConfigError: it cannot be read.
    """
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _value(line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); pass a JSONL file in UTF-8") from None


def require_object(record: Any) -> dict[str, Any]:
    """Return a record that is a JSON object.

    Raises:
        BadRecordError: it is none, or its line could not be read.
    """
    if isinstance(record, BadRecordError):
        raise record
    if not isinstance(record, dict):
        raise BadRecordError(f"must be a JSON object, is {shorten(record)}; write one object per line")
    return record


def read_problem(
    record: Any, source: str, prompt_key: str | None, answer_key: str | None, answer_format: AnswerFormat
) -> Problem:
    """Turn a record into a problem; its other fields go along as ``metadata``, for the grader.

    Args:
        record: a JSON object.
        source: where it stands.
        prompt_key, answer_key: names of its fields; None for prompt or question, and answer.
        answer_format: how the result stands in the answer: alone (plain), behind #### (gsm8k), in the last box (boxed);
            auto takes #### where the field of the prompt is called question and no other name was given, else what it
            finds.

    Raises:
        BadRecordError: it is none.
    """
    record = require_object(record)
    given = prompt_key is not None
    prompt_key = prompt_key or ("question" if "question" in record and "prompt" not in record else "prompt")
    answer_key = answer_key or "answer"
    prompt, answer = record.get(prompt_key), record.get(answer_key)
    for name, value, kinds in ((prompt_key, prompt, str), (answer_key, answer, (str, int, float))):
        number = isinstance(value, _Number)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and (name != prompt_key or not number)
        fits = fits and value == value  # a table's NaN stands for nothing
        if not fits or not str(value).strip():
            raise BadRecordError(
                f"{name!r} must be a text that is not empty, is {shorten(_ordinary(value))}"
                + ("" if name in record else f"; the fields here are {', '.join(map(repr, record)) or 'none'}")
            )
        _check_text(name, str(value))
    result = _result(str(answer), answer_format, strict=prompt_key == "question" and not given)
    others = {key: _ordinary(value) for key, value in record.items() if key not in (prompt_key, answer_key)}
    return Problem(str(prompt), result, others or None, source)


def collect(
    records: Iterable[tuple[str, Any]], where: str, bad: BadLines, read: Callable[[Any, str], Problem]
) -> tuple[list[Problem], int]:
    """Read all records; of equal ones only the first is kept.

    Args:
        records: (place, value) of each.
        where: what they belong to.
        bad: what becomes of those that are no problem: refuse the whole, or leave_out.
        read: turns a record and its place into a problem, as :func:`read_problem` does.

    Returns:
        The problems, and how many records were left out.

    Raises:
        ConfigError: names the place and what is wrong, or nothing is left.
    """
    found: dict[str, Problem] = {}
    left_out, reason = 0, ""
    for source, record in records:
        try:
            problem = read(record, source)
            earlier = found.get(problem.prompt)
            if earlier is not None and not _same_answer(earlier.answer, problem.answer):
                raise BadRecordError(
                    f"has the prompt of {earlier.source.rpartition(', ')[2]} with another answer, {problem.answer!r} "
                    f"instead of {earlier.answer!r}; correct one of them"
                )
            found.setdefault(problem.prompt, problem)
        except BadRecordError as error:
            reason = f"{source}: {error}"
            if bad == "refuse":
                way_out = "" if "; " in str(error) else '; correct it, or set bad_lines = "leave_out"'
                raise ConfigError(reason + way_out) from None
            left_out += 1
    if not found:
        raise ConfigError(f"{where}: holds no problem{f' ({reason})' if reason else ''}")
    return list(found.values()), left_out


def _value(line: str) -> Any:
    try:
        return json.loads(line, parse_int=_Number, parse_float=_Number, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return BadRecordError(f"not valid JSON ({error})")


def _ordinary(value: Any) -> Any:
    """A JSON value with numbers in place of how they are written."""
    if isinstance(value, _Number):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: _ordinary(own) for key, own in value.items()}
    return [_ordinary(own) for own in value] if isinstance(value, list) else value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{name!r} holds half of a surrogate pair at place {error.start}, which is no text"
        ) from None


def _result(answer: str, answer_format: AnswerFormat, strict: bool) -> str:
    """The part of an answer that is the result."""
    marked = MARK in answer
    if answer_format == "gsm8k" or (answer_format == "auto" and (strict or marked)):
        if not marked:
            raise BadRecordError(
                f"'answer' has no {MARK!r} before the result, as GSM8K's have; set answer_format = \"plain\" if it is "
                f"the result itself"
            )
        result = answers.canonical_number(answer.rpartition(MARK)[2])
        if not result:
            raise BadRecordError(f"'answer' has nothing behind its last {MARK!r}")
        return result
    if answer_format == "boxed" or (answer_format == "auto" and "\n" in answer.strip()):
        boxed = answers.last_boxed(answer)
        if boxed is not None:
            return boxed.strip()
        if answer_format == "boxed":
            raise BadRecordError("'answer' has no \\boxed{} with the result")
    return answer.strip()


def _same_answer(one: str, other: str) -> bool:
    if one == other or answers.same_text(one, other):
        return True
    value = answers.number(one)
    return value is not None and value == answers.number(other)
