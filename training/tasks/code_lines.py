"""The task code_lines: completing a line of a code base, given the lines before it and how it begins.

The code base is an installed Python package, vLLM by default. Its files are split by :mod:`code_corpus`; problems are
made from them when they are asked for, so that no line of it is kept anywhere else.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import random
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import cached_pair
from vllm_cospec.training.tasks.code_corpus import Source, fingerprint, read_corpus
from vllm_cospec.training.tasks.protocol import Options, Problem, task
from vllm_cospec.training.tasks.splits import Split

Half = Literal["first", "second"]
LEARNT_PACKAGE = "vllm"  # whose pretrain split the pair's draft has seen
TRAINING = "training.json"  # beside the draft: what it was trained on
CONTEXT = 220  # tokens of preceding lines, at most
LEAST_CONTEXT = 120
SHORTEST, LONGEST = 12, 90  # characters of a line without its indentation

_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_START", tokenize.STRING)}
_STRING_ENDS = {tokenize.STRING, getattr(tokenize, "FSTRING_END", tokenize.STRING)}


@dataclass(frozen=True)
class Place:
    """Where a problem was taken from."""

    path: str
    line: int  # from 1
    text: str  # the whole line, without indentation


class CodeLinesOptions(Options):
    """Of the task code_lines."""

    package: str = "vllm"
    """Installed package whose lines are completed."""
    half: Half | None = None
    """Take only the files of one half of the package's directories; which half a directory is in, its name decides."""
    tokenizer: str | None = None
    """Directory of the tokenizer at whose token boundaries lines are cut; left out: the target of the code pair."""


@task("code_lines", CodeLinesOptions)
class CodeLines:
    """Lines of 12 to 90 characters that are neither comment, import, decorator nor string."""

    def __init__(self, options: CodeLinesOptions):
        self._options = options
        check_corpus(options.package, cached_pair("code") / "draft" / TRAINING)

    def problems(self, seed: int, n: int, split: Split = "test") -> list[Problem]:
        """See :meth:`Task.problems`.

        Raises:
            ConfigError: the split has fewer than ``n``, or there is no tokenizer.
        """
        package, half = self._options.package, self._options.half
        directory = self._options.tokenizer or str(cached_pair("code") / "target")
        drawn = draw_problems(package, split, seed, load_tokenizer(directory))
        chosen = list(islice((p for p in drawn if half in (None, half_of(p.metadata.path))), n))
        if len(chosen) < n:
            raise ConfigError(f"task: {package!r} has {len(chosen)} problems for {split}, {n} were asked for")
        return chosen

    def score(self, problem: Problem, text: str) -> float:
        """1.0 when the completion's first line is the rest of the line, white space around it aside."""
        return float(first_line(text) == problem.answer)

    def figures(self, problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, float]:
        """Return what a table of results says beside accuracy.

        Returns:
            ``edit_similarity``: mean share of matching characters, 0 to 1. ``accuracy_new_lines``: accuracy on the
            ``num_new_lines`` lines that occur nowhere in the text the draft was trained on.
        """
        learnt = learnt_lines()
        pairs = list(zip(problems, texts, strict=True))
        new = [self.score(p, t) for p, t in pairs if p.metadata.text not in learnt]
        return {
            "edit_similarity": sum(similarity(p.answer, first_line(t)) for p, t in pairs) / len(pairs),
            "accuracy_new_lines": sum(new) / max(1, len(new)),
            "num_new_lines": len(new),
        }


def check_corpus(package: str, record: Path) -> None:
    """See to it that the code base is the one whose pretrain split the pair's draft was trained on.

    Args:
        package: the code base; another one than the draft's is only read.
        record: what the draft was trained on; nothing is compared before the pair is built.

    Raises:
        ConfigError: the package is not installed, or has other files: what tests here may have been learnt there.
    """
    found = fingerprint(read_corpus(package))
    if package != LEARNT_PACKAGE or not record.is_file():
        return
    made = json.loads(record.read_text())
    if made["splits"] != found:
        raise ConfigError(
            f"task: the draft was trained on the files of {package} {made['version']}, and other ones are installed; "
            f"install {package} {made['version']}, or train a draft on these (training/pairs/code/draft.py)"
        )


def first_line(text: str) -> str:
    """Return a response up to its first line break, without white space around it."""
    return text.partition("\n")[0].strip()


def similarity(one: str, other: str) -> float:
    """Return twice the number of matching characters over the number of all, 0 to 1."""
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def half_of(path: str) -> Half:
    """Return the half of a package that a file's directory, two levels deep at most, belongs to."""
    directory = "/".join(path.split("/")[:-1][:2])
    return "second" if hashlib.blake2b(directory.encode(), digest_size=1).digest()[0] % 2 else "first"


@cache
def learnt_lines() -> frozenset[str]:
    """Return every line the pair's draft was trained on, without its indentation."""
    sources = [source for source in read_corpus(LEARNT_PACKAGE) if source.split == "pretrain"]
    return frozenset(line.strip() for source in sources for line in source.lines)


@lru_cache(maxsize=2)
def load_tokenizer(directory: str) -> Any:
    """Return a tokenizer.

    Raises:
        ConfigError: the directory has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"task.options.tokenizer: none in {directory!r} ({reason}); run make code-pair") from None


def lines_of_code(text: str) -> list[int]:
    """Return the numbers, from 0, of lines that may be asked for.

    They have SHORTEST to LONGEST characters and are no comment, import or decorator, nor begin with a string or hold
    part of one that goes over several lines.
    """
    excluded: set[int] = set()
    begun: set[int] = set()  # rows whose first token was seen
    statement = True  # the next token begins a statement
    skipping = False  # inside an import or a decorator
    string_starts: list[int] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            row = token.start[0] - 1
            if token.type in _LAYOUT:
                if token.type == tokenize.NEWLINE:
                    statement, skipping = True, False
                continue
            if token.type == tokenize.COMMENT:
                if row not in begun:
                    excluded.add(row)
                continue
            if statement:
                statement, skipping = False, token.string in ("import", "from", "@")
            if token.type in _STRINGS:
                string_starts.append(row)
                if row not in begun:
                    excluded.add(row)
            if token.type in _STRING_ENDS:
                first = string_starts.pop()
                if first != token.end[0] - 1:
                    excluded.update(range(first, token.end[0]))
            if skipping:
                excluded.update(range(row, token.end[0]))
            begun.add(row)
    except (tokenize.TokenError, SyntaxError):
        return []
    lines = text.split("\n")
    return [row for row in sorted(begun - excluded) if SHORTEST <= len(lines[row].strip()) <= LONGEST]


def make_problem(source: Source, row: int, tokenizer: Any, rng: random.Random) -> Problem | None:
    """Cut a line at a random token boundary in its first half.

    Args:
        source: the file.
        row: the line's number, from 0.
        tokenizer: the target's.
        rng: draws the boundary.

    Returns:
        The problem, or None where too few lines stand before the line or no boundary is one for the tokenizer too.
    """
    lines = source.lines
    first, context = row, 0
    counts = _token_counts(source, tokenizer)
    while first > 0 and context + counts[first - 1] <= CONTEXT:
        first -= 1
        context += counts[first]
    if context < LEAST_CONTEXT:
        return None
    before = "\n".join(lines[first:row]) + "\n"
    line = lines[row].rstrip()
    start = len(before) + len(line) - len(line.lstrip())
    text = before + line
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    middle = start + len(line.lstrip()) / 2
    cuts = [(at, end) for at, (_, end) in enumerate(encoded["offset_mapping"], 1) if start < end <= middle]
    if not cuts:
        return None
    number, cut = rng.choice(cuts)
    prompt, answer = text[:cut], text[cut:].strip()
    if tokenizer(prompt, add_special_tokens=False)["input_ids"] != encoded["input_ids"][:number] or not answer:
        return None
    return Problem(prompt, answer, Place(source.path, row + 1, line.strip()))


@lru_cache(maxsize=512)
def _token_counts(source: Source, tokenizer: Any) -> list[int]:
    """Tokens of each line with its line break."""
    encoded = tokenizer([line + "\n" for line in source.lines], add_special_tokens=False)
    return [len(ids) for ids in encoded["input_ids"]]


@lru_cache(maxsize=8)
def candidates(package: str, split: Split) -> tuple[tuple[Source, int], ...]:
    """Return every line of a split that may be asked for, as (file, line number from 0)."""
    sources = [source for source in read_corpus(package) if source.split == split]
    return tuple((source, row) for source in sources for row in lines_of_code(source.text))


def draw_problems(package: str, split: Split, seed: int, tokenizer: Any) -> Iterator[Problem]:
    """Yield the problems of a split in a seeded order; no two have the same prompt."""
    rng = random.Random(f"code_lines/{package}/{split}/{seed}")
    order = list(candidates(package, split))
    rng.shuffle(order)
    seen: set[str] = set()
    for source, row in order:
        problem = make_problem(source, row, tokenizer, rng)
        if problem is not None and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem
