"""Asks a server for completions over HTTP, streaming, and keeps the times. Used by the throughput benchmark."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI


@dataclass(frozen=True)
class Load:
    """How requests are sent."""

    max_tokens: int
    temperature: float
    max_concurrency: int
    max_model_len: int | None = None  # prompt and answer together


@dataclass
class Reply:
    """One answered request; times in seconds since it was sent."""

    text: str
    output_tokens: int
    capped: bool  # ended by max_tokens
    arrivals: list[float]  # of every piece of text


async def ask(url: str, model: str, prompts: Sequence[Sequence[int]], load: Load) -> list[Reply]:
    """Send every prompt as token ids, ``max_concurrency`` at a time; replies come in the order of the prompts.

    Token ids, so that a server answers what ``cospec evaluate`` asks: a chat template was applied where there is one.

    Raises:
        openai.OpenAIError: the server refused a request or is gone.
    """
    gate = asyncio.Semaphore(load.max_concurrency)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=600) as client:

        async def one(index: int, prompt: Sequence[int]) -> Reply:
            async with gate:
                sent = time.perf_counter()
                reply = Reply("", 0, False, [])
                room = load.max_model_len - len(prompt) if load.max_model_len else load.max_tokens
                stream: Any = await client.completions.create(
                    model=model,
                    prompt=list(prompt),
                    max_tokens=min(load.max_tokens, room),
                    temperature=load.temperature,
                    seed=index,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for event in stream:
                    if event.usage is not None:
                        reply.output_tokens = event.usage.completion_tokens
                    for choice in event.choices:
                        if choice.text:
                            reply.arrivals.append(time.perf_counter() - sent)
                            reply.text += choice.text
                        if choice.finish_reason is not None:
                            reply.capped = choice.finish_reason == "length"
                return reply

        return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
