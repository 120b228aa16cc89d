"""Whether a draft means the same by its tokens as the target does.

vLLM compares two numbers, the sizes of the vocabularies. Strict verification gets by with that: a draft of another
language is rejected token by token. An arbiter keeps such drafts, so here every token is compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

PLACEHOLDER = re.compile(r"[<\[].*(reserved|unused|extra|dummy|placeholder|pad).*[>\]]", re.IGNORECASE)
"""Tokens that only fill a vocabulary up: never read, never written."""

PROBE = "  The 3rd of May, 1234567890: naïve ﬁ café\n\tdef f(x):  return x ** 2  # 漢字 🙂 DON'T\r\n"
"""A text that tokenizers split differently when their merges, normalisation, or ways with spaces and digits differ."""


@dataclass(frozen=True)
class Difference:
    """A token that one tokenizer has and another lacks, or has under another id."""

    token_id: int
    token: str
    other: str | None
    """What the other tokenizer has under that id."""


def only_in(one: dict[str, int], other: dict[str, int]) -> Difference | None:
    """Return the token of lowest id that ``one`` has and ``other`` lacks under that id, placeholders aside.

    Args:
        one: token to id.
        other: likewise.
    """
    missing = [
        (token_id, token)
        for token, token_id in one.items()
        if other.get(token) != token_id and not PLACEHOLDER.fullmatch(token)
    ]
    if not missing:
        return None
    token_id, token = min(missing)
    return Difference(token_id, token, next((t for t, i in other.items() if i == token_id), None))


def same_split(one: Any, other: Any) -> bool:
    """Return whether two tokenizers of the same vocabulary split :data:`PROBE` alike."""
    return list(one.encode(PROBE, add_special_tokens=False)) == list(other.encode(PROBE, add_special_tokens=False))
