"""``--speculative-config '{...}'`` beside ``--speculative-config.KEY VALUE`` on one command line.

vLLM hands the dotted keys to the parser as a second JSON object, and the later object takes the place of the first: of
``'{"method":"cospec"}'`` and ``.num_speculative_tokens 3`` only the number would be left, or worse, a strict server.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

from vllm.logger import init_logger

from vllm_cospec.config import WHERE, asked_for

logger = init_logger("vllm.cospec")

FLAG = "--speculative-config"


class MergeObjects(argparse.Action):
    """Stores the value; a JSON object that belongs to one asking for cospec is merged with it, the later keys win."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        if isinstance(before, dict) and isinstance(values, dict) and (asked_for(before) or asked_for(values)):
            values = merged(before, values)
            logger.warning("%s: given more than once, taken together as %s", WHERE, json.dumps(values))
        setattr(namespace, self.dest, values)


def merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return both, ``after`` winning; objects are merged in their turn, but those of two policies are not."""
    result = dict(before)
    for key, value in after.items():
        own = result.get(key)
        if (
            isinstance(own, dict)
            and isinstance(value, dict)
            and value.get("policy", own.get("policy")) == own.get("policy")
        ):
            value = merged(own, value)
        result[key] = value
    return result


def make_add_cli_args(original: Any) -> Any:
    """Return ``EngineArgs.add_cli_args`` with the flag's action replaced."""

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        action = parser._option_string_actions.get(FLAG)
        if type(action) is argparse._StoreAction:
            action.__class__ = MergeObjects  # type: ignore[assignment]
        return parser

    return staticmethod(add_cli_args)
