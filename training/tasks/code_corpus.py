"""Python sources of an installed package, split by file for a draft, an arbiter and their tests.

A hash of a file's path decides its split. Files that share code, such as backends copied from one directory to another,
form a group and go where the first of them goes. No text leaves the package: what is kept are paths and checksums.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.tasks.splits import Split

BUCKETS: dict[Split, range] = {  # of 64
    "pretrain": range(0, 48),
    "train": range(48, 54),
    "calibration": range(54, 58),
    "test": range(58, 64),
}
WINDOW = 5  # consecutive lines that count as one piece of code
SHARED = 0.3  # share of a file's pieces that another file has too, from which on the two are a group
COMMON = 100  # files; a piece in more of them says nothing about any two


@dataclass(frozen=True)
class Source:
    """One file."""

    path: str  # within the package, with forward slashes
    text: str
    split: Split

    @cached_property
    def lines(self) -> list[str]:
        """Its lines, without line breaks."""
        return self.text.split("\n")


def package_directory(package: str) -> Path:
    """Return where a package is installed, without importing it.

    Raises:
        ConfigError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"package: {package!r} is not installed; its Python files are the problems' source")
    return Path(next(iter(found.submodule_search_locations)))


@lru_cache(maxsize=2)
def read_corpus(package: str) -> tuple[Source, ...]:
    """Return the package's Python files with their splits, in the order of their paths.

    Raises:
        ConfigError: the package is not installed, or a file of it is not UTF-8.
    """
    root = package_directory(package)
    texts: dict[str, str] = {}
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        try:
            texts[file.relative_to(root).as_posix()] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"package: {file} is not UTF-8 ({error}); install {package} anew") from None
    leaders = group_files(texts)
    return tuple(Source(path, text, split_of_file(leaders[path])) for path, text in texts.items())


def split_of_file(path: str) -> Split:
    """Return the split that a file's path stands for."""
    bucket = hashlib.blake2b(path.encode(), digest_size=4).digest()[0] % 64
    return next(split for split, buckets in BUCKETS.items() if bucket in buckets)


def group_files(texts: dict[str, str]) -> dict[str, str]:
    """Find files that share code.

    Args:
        texts: by path.

    Returns:
        By path, the first path of its group; a file that is like no other is a group of its own.
    """
    pieces = {path: _pieces(text) for path, text in texts.items()}
    holders: dict[int, list[str]] = defaultdict(list)
    for path in sorted(texts):
        for piece in pieces[path]:
            holders[piece].append(path)
    shared: dict[tuple[str, str], int] = defaultdict(int)
    for paths in holders.values():
        if 1 < len(paths) <= COMMON:
            for at, later in enumerate(paths):
                for earlier in paths[:at]:
                    shared[earlier, later] += 1
    leader = {path: path for path in texts}

    def find(path: str) -> str:
        while leader[path] != path:
            leader[path] = leader[leader[path]]
            path = leader[path]
        return path

    for (earlier, later), count in shared.items():
        if count >= WINDOW and count >= SHARED * min(len(pieces[earlier]), len(pieces[later])):
            one, other = sorted((find(earlier), find(later)))
            leader[other] = one
    return {path: find(path) for path in texts}


def _pieces(text: str) -> set[int]:
    """Every run of WINDOW lines of code, as numbers that are equal for equal runs in this process."""
    lines = [line.strip() for line in text.split("\n")]
    code = [line for line in lines if line and not line.startswith(("#", "import ", "from "))]
    return {hash(tuple(code[i : i + WINDOW])) for i in range(len(code) - WINDOW + 1)}


def fingerprint(sources: tuple[Source, ...]) -> dict[str, str]:
    """Return a SHA-256 per split, over paths and texts of its files; it changes with any of them."""
    digests = {split: hashlib.sha256() for split in BUCKETS}
    for source in sources:
        entry = hashlib.sha256(source.text.encode()).hexdigest()
        digests[source.split].update(f"{source.path} {entry}\n".encode())
    return {split: digest.hexdigest() for split, digest in digests.items()}
