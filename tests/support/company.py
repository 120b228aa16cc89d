"""Requests of mixed kinds, for the tests that what runs beside a request does not change its text."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_cospec.training.tasks import load_task

Job = tuple[str, dict[str, Any]]
KINDS = (
    "greedy", "greedy", "greedy", "seeded", "seeded", "seeded", "cold", "top_p", "top_k", "penalised", "logprobs",
    "grammar", "long", "long", "shared prefix", "shared prefix", "bad words", "minimum", "one token",
)  # fmt: skip
SHARED = "12+34+56+78-90*2?" * 4  # longer than two blocks of the KV cache


def short_draft(pair: Path, directory: Path, context: int = 64) -> Path:
    """Write the bundled draft with so short a context, a table of positions as long, and return where."""
    shutil.copytree(pair / "draft", directory)
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": context}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def is_thinking(prompt: str, tokens: Sequence[int], begin: int, end: int) -> bool:
    """Whether a model goes on thinking behind these tokens, where the digits 1 and 2 begin and end it."""
    thinking = prompt.rfind("1") > prompt.rfind("2")
    for token in tokens:
        thinking = token == begin or (thinking and token != end)
    return thinking


def mixed_requests(
    n: int, seed: int, max_model_len: int = 128, max_tokens: int = 60, grammar: bool = True
) -> list[Job]:
    """Return prompts of the bundled pair with the parameters of engines.py; a quarter of them is strict.

    Args:
        n: how many.
        seed: of the choice.
        max_model_len: of the target; some of the prompts come near it.
        max_tokens: of a response.
        grammar: whether some are structured outputs, arbitrated all the same.
    """
    rng = random.Random(seed)
    jobs = []
    for i, problem in enumerate(load_task("demo").problems(seed=seed, n=n)):
        prompt = problem.prompt
        params: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
        kind = rng.choice(KINDS)
        if kind == "seeded":
            params |= {"temperature": rng.choice([0.5, 0.8, 1.0]), "seed": i}
        elif kind == "cold":
            params |= {"temperature": 0.01, "seed": i}
        elif kind in ("top_p", "top_k"):
            params |= {"temperature": 0.8, "seed": i, kind: {"top_p": 0.9, "top_k": 5}[kind]}
        elif kind == "penalised":
            penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.1}
            params |= penalties | {"temperature": rng.choice([0.0, 0.7]), "seed": i}
        elif kind == "logprobs":
            params["logprobs"] = 3
        elif kind == "grammar" and grammar:
            params |= {"regex": "[0-9=*+;#-]{8,40}", "extra_args": {"cospec_policy": "learned"}}
        elif kind == "long":
            prompt = (prompt + "1+1?2;" * max_model_len)[: max_model_len - rng.choice([18, 28, 38])]
            params["max_tokens"] = 30
        elif kind == "shared prefix":
            prompt = SHARED[: rng.choice([20, 33, 50, 64, 65])] + prompt
        elif kind == "bad words":
            params["bad_words"] = ["="]
        elif kind == "minimum":
            params["min_tokens"] = max_tokens - 10
        elif kind == "one token":  # the one in front of every text: padded with placeholders where others decode
            prompt, params["temperature"], params["seed"] = "", 0.8, i
        if rng.random() < 0.25:
            params["extra_args"] = {"cospec_policy": "strict"}
        jobs.append((prompt, params))
    return jobs


def differing(alone: list[Any], beside: list[Any], order: list[int]) -> list[int]:
    """Return which results changed; ``beside[i]`` is that of request ``order[i]``."""
    return sorted(request for request, result in zip(order, beside, strict=True) if result != alone[request])
