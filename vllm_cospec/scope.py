"""The tokens between which a model thinks: given by hand, or those of vLLM's reasoning parser."""

from __future__ import annotations

from typing import Any

from vllm_cospec.errors import ConfigError, reason

UNKNOWN = (
    "needs the tokens between which the model thinks, and none are known here; serve with --reasoning-parser, or pass "
    "thinking_tokens, the ids of the two"
)


def thinking_tokens(given: tuple[int, int] | None, parser: str | None, tokenizer: Any) -> tuple[int, int] | None:
    """Return the ids of the tokens that begin and end thinking, None where they are not known.

    Args:
        given: by hand; they go first.
        parser: name of vLLM's reasoning parser; None or empty for none.
        tokenizer: loads the target's; called only for a parser.

    Raises:
        ConfigError: the parser cannot be built for this tokenizer.
    """
    if given is not None or not parser:
        return given
    from vllm.reasoning import ReasoningParserManager

    try:
        own = tokenizer()
        built: Any = ReasoningParserManager.get_reasoning_parser(parser)(own)
        marks = [getattr(built, name, None) for name in ("reasoning_start_str", "reasoning_end_str")]
        ids = [own.encode(mark, add_special_tokens=False) if mark else [] for mark in marks]
    except Exception as error:  # each parser has its own
        raise ConfigError(
            f"reasoning_parser: {parser!r} does not say where the model thinks ({reason(error, 200)}); pass "
            f"thinking_tokens"
        ) from None
    return (ids[0][0], ids[1][0]) if all(len(own) == 1 for own in ids) else None
