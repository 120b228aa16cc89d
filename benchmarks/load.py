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


@dataclass
class Reply:
    """One answered request; times in seconds since it was sent."""

    text: str
    output_tokens: int
    capped: bool  # ended by max_tokens
    arrivals: list[float]  # of every piece of text


async def ask(url: str, model: str, prompts: Sequence[str], load: Load, chat: bool) -> list[Reply]:
    """Send every prompt, ``max_concurrency`` at a time; replies come in the order of the prompts.

    Args:
        url: of the server.
        model: its name there.
        prompts: what to ask.
        load: how.
        chat: as a message; else as the beginning of a text, for a model without a chat template.

    Raises:
        openai.OpenAIError: the server refused a request or is gone.
    """
    gate = asyncio.Semaphore(load.max_concurrency)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=600) as client:

        async def one(index: int, prompt: str) -> Reply:
            async with gate:
                sent = time.perf_counter()
                reply = Reply("", 0, False, [])
                common: dict[str, Any] = {
                    "model": model, "temperature": load.temperature, "seed": index, "stream": True,
                    "stream_options": {"include_usage": True},
                }  # fmt: skip
                stream: Any
                if chat:
                    messages: Any = [{"role": "user", "content": prompt}]
                    stream = await client.chat.completions.create(
                        messages=messages, max_completion_tokens=load.max_tokens, **common
                    )
                else:
                    stream = await client.completions.create(prompt=prompt, max_tokens=load.max_tokens, **common)
                async for event in stream:
                    if event.usage is not None:
                        reply.output_tokens = event.usage.completion_tokens
                    for choice in event.choices:
                        text = choice.delta.content if chat else choice.text
                        if text:
                            reply.arrivals.append(time.perf_counter() - sent)
                            reply.text += text
                        if choice.finish_reason is not None:
                            reply.capped = choice.finish_reason == "length"
                return reply

        return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
