"""The batches of the interpreted tests, on a device, and those whose time is taken."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[2] / "tests"
for folder in (TESTS / "interpreted" / "stand_in", TESTS / "support"):  # where the generator of batches lies
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import arbitration_cases as generated  # noqa: E402

from vllm_cospec.kernels import UNLIMITED  # noqa: E402

VOCAB_SIZES = (151_936, 128_256, 32_000, 49_155)
BATCHES = (1, 8, 64, 256)
NUM_DRAFT_TOKENS, AGREEMENT, KEPT = 5, 0.7, 0.3
_ROW_UNIT = 64  # vLLM's models pad rows of logits to multiples of this and hand over the part that is the vocabulary


def moved(value: Any, device: torch.device) -> Any:
    """Return a batch, or any other dataclass of tensors, on a device; what was one tensor stays one."""
    seen: dict[int, torch.Tensor] = {}

    def move(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return seen.setdefault(id(part), part.to(device))
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{field.name: move(getattr(part, field.name)) for field in fields(part)})
        return part

    return move(value)


def padded_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return uninitialised logits as vLLM's models hand them over: rows of a buffer that is a little wider."""
    width = -(-shape[-1] // _ROW_UNIT) * _ROW_UNIT
    return torch.empty(*shape[:-1], width, dtype=dtype, device=device)[..., : shape[-1]]


def timed_case(
    vocab: int, batch: int, sampled: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> generated.Case:
    """A step of ``batch`` requests with five drafts each, of which seven in ten are the target's first choice.

    Choices are so sharp that a sampled request accepts what a greedy one accepts, and of the requests three in ten
    have a threshold that keeps whatever the learned policy is asked about, the others one that keeps nothing.
    """
    random, k = np.random.default_rng(batch), NUM_DRAFT_TOKENS
    num_rows = batch * (k + 1)
    raw = padded_rows((num_rows, vocab), dtype, device).normal_()
    draft = padded_rows((batch, k, vocab), dtype, device).normal_()
    agrees = random.random((batch, k)) < AGREEMENT
    choice = random.integers(0, vocab - 1, (batch, k))
    rows = (np.arange(batch)[:, None] * (k + 1) + np.arange(k)).reshape(-1)
    tokens = np.zeros(num_rows, np.int32)
    tokens[rows + 1] = np.where(agrees, choice, choice + 1).reshape(-1)
    rows_here = torch.from_numpy(rows).to(device)
    raw[rows_here, torch.from_numpy(choice.reshape(-1)).to(device)] = 60.0
    proposed = torch.from_numpy(tokens[rows + 1].astype(np.int64)).to(device)
    place = torch.arange(batch * k, device=device)
    draft[place // k, place % k, proposed] = 60.0
    slots = generated.make_slots(batch, random, arbitrated=1.0)
    slots.max_overrides.fill_(UNLIMITED)
    for limit in (slots.exact_tokens, slots.overrides_so_far):
        limit.zero_()
    slots.response_start.fill_(1)
    slots.threshold.copy_(torch.from_numpy(np.where(random.random(batch) < KEPT, -1.0, 2.0)))
    case = generated.Case(
        raw=raw, processed=raw, draft=draft, draft_sampled=torch.from_numpy(tokens), num_drafts=[k] * batch,
        slot=list(range(batch)), num_speculative_steps=k, temperature=torch.full((batch,), float(sampled)),
        seed=torch.arange(batch), pos=torch.arange(k + 1).repeat(batch), slots=slots,
    )  # fmt: skip
    return moved(case, device)
