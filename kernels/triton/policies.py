"""The policies as device code: one branch each, chosen at compile time.

What a rule means is said in :mod:`vllm_cospec.kernels.policies`; here every rule sees the same scalars of one mismatch.
The learned policy is a network of one or two hidden layers, evaluated in float32 by one program:

    x' = (x - mean) / scale,   h = relu(W1 x' + b1),   h' = relu(W2 h + b2),   score = sigmoid(w . h' + b)

Its weights lie in one float32 vector, layer after layer, so that new ones can be copied in without a launch changing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

from vllm_cospec.kernels.policies import Cascade, Fly, Learned, Policy
from vllm_cospec.kernels.statistics import NUM_STATISTICS

STRICT, TYPICAL, RELAXED_TOPK, THRESHOLD, CASCADE, MARS, FLY, KL, RANDOM, LEARNED = map(tl.constexpr, range(10))
CODES = ("strict", "typical", "relaxed_topk", "threshold", "cascade", "mars", "fly", "kl", "random", "learned")
"""Names of the policies, each at the index of its code."""

_STATISTICS = tl.constexpr(NUM_STATISTICS)
_TILE = tl.constexpr(16)  # rows of the second layer at a time: 16 x 256 floats fit the registers of four warps
_COIN_POSITION, _COIN_DRAFT, _COIN_TARGET = map(tl.constexpr, (0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F))


@dataclass(frozen=True)
class Program:
    """A policy as the kernels take it: a code, at most two numbers, the weights."""

    code: int
    first: float = 0.0
    second: float = 0.0
    seed: int = 0  # of the coin, already multiplied, modulo 2^32
    window: int = 0  # of fly
    top_k: int = 2  # largest target logits that are kept; the gap needs two
    entropy_k: int = 2  # how many of them the top-k entropy is taken over
    hidden: tuple[int, int] = (1, 0)  # widths of the learned network, 0 for no second layer
    weights: Tensor | None = None  # [number of weights] float32, on the device
    needs_draft: bool = False  # whether the decision looks at the draft's distribution

    @property
    def name(self) -> str:
        """The policy's name."""
        return CODES[self.code]


def compile_policy(policy: Policy, device: torch.device, arbiter: Any = None, collect: bool = False) -> Program:
    """Translate a policy.

    Args:
        policy: with ``fly``'s window resolved.
        device: where the weights go.
        arbiter: the network, for the learned policy.
        collect: statistics are wanted whatever the policy needs, so the draft's are computed too.
    """
    code = CODES.index(policy.policy)
    if isinstance(policy, Learned):
        sizes = tuple(arbiter.hidden_sizes)
        weights = flatten_weights(arbiter.state_dict()).to(device)
        return Program(code, hidden=(sizes[0], sizes[1] if len(sizes) > 1 else 0), weights=weights, needs_draft=True)
    needs_draft = collect or policy.needs_draft_logits
    if isinstance(policy, Fly):
        if policy.window is None:
            raise ValueError("fly: window must be resolved against num_speculative_tokens first")
        k = policy.entropy_top_k
        return Program(
            code, policy.entropy_threshold, window=policy.window, top_k=max(2, k), entropy_k=k, needs_draft=needs_draft
        )
    numbers: list[float] = list(policy.model_dump(exclude={"policy", "seed"}).values())
    if isinstance(policy, Cascade):
        numbers = [1 - policy.alpha]  # subtracted here, in double precision, as the rule does
    first, second = (*map(float, numbers), 0.0, 0.0)[:2]
    seed = (getattr(policy, "seed", 0) * 0x9E3779B1) & 0xFFFFFFFF
    return Program(code, first, second, seed, needs_draft=needs_draft)


def flatten_weights(state_dict: dict[str, Tensor]) -> Tensor:
    """Return an arbiter's tensors end to end, float32: mean, scale, then weight and bias of each layer."""
    layers = sorted({int(name.split(".")[1]) for name in state_dict if name.startswith("layers.")})
    names = ["mean", "scale", *(f"layers.{i}.{part}" for i in layers for part in ("weight", "bias"))]
    return torch.cat([state_dict[name].detach().float().reshape(-1) for name in names])


@triton.jit
def coin(seed, output_position, draft_token, target_token):
    """The hash of :func:`vllm_cospec.kernels.policies.coin`, which works modulo 2^32, in unsigned 32-bit arithmetic."""
    x = seed.to(tl.uint32)
    x += output_position.to(tl.uint32) * _COIN_POSITION
    x += draft_token.to(tl.uint32) * _COIN_DRAFT
    x += target_token.to(tl.uint32) * _COIN_TARGET
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.int32).to(tl.float32) / 16777216.0


@triton.jit
def network_score(
    statistics,  # [16] float32
    weights_ptr,
    HIDDEN_1: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    PADDED_1: tl.constexpr,
    PADDED_2: tl.constexpr,
):
    """The learned policy's score of one mismatch, in (0, 1)."""
    column = tl.arange(0, _STATISTICS)
    mean = tl.load(weights_ptr + column)
    scale = tl.load(weights_ptr + _STATISTICS + column)
    x = (statistics - mean) / scale
    weights_ptr += 2 * _STATISTICS
    unit = tl.arange(0, PADDED_1)
    present = unit < HIDDEN_1
    weight = tl.load(weights_ptr + unit[:, None] * _STATISTICS + column[None, :], mask=present[:, None], other=0.0)
    weights_ptr += HIDDEN_1 * _STATISTICS
    hidden = tl.sum(weight * x[None, :], axis=1) + tl.load(weights_ptr + unit, mask=present, other=0.0)
    hidden = tl.maximum(hidden, 0.0)
    weights_ptr += HIDDEN_1
    if HIDDEN_2 == 0:
        logit = tl.sum(hidden * tl.load(weights_ptr + unit, mask=present, other=0.0), axis=0)
        logit += tl.load(weights_ptr + HIDDEN_1)
    else:
        bias_ptr = weights_ptr + HIDDEN_2 * HIDDEN_1
        logit = tl.load(bias_ptr + 2 * HIDDEN_2)
        for first in range(0, PADDED_2, _TILE):
            row = first + tl.arange(0, _TILE)
            there = row < HIDDEN_2
            tile = tl.load(
                weights_ptr + row[:, None] * HIDDEN_1 + unit[None, :],
                mask=there[:, None] & present[None, :],
                other=0.0,
            )
            second = tl.sum(tile * hidden[None, :], axis=1) + tl.load(bias_ptr + row, mask=there, other=0.0)
            out = tl.load(bias_ptr + HIDDEN_2 + row, mask=there, other=0.0)
            logit += tl.sum(tl.maximum(second, 0.0) * out, axis=0)
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def rule_keeps(
    logprob_draft,  # log p(d)
    logprob_top,  # log p(t*)
    entropy,
    rank,  # of d, from 0
    logit_draft,  # raw
    logit_top,  # raw
    top_k_entropy,
    kl,
    acceptance_ratio,
    uniform,
    native_run,  # following drafts that strict verification accepts, consecutive
    remaining,  # draft tokens after this one
    output_position,
    draft_token,
    target_token,
    first,
    second,
    seed,
    window,
    POLICY: tl.constexpr,
):
    """Whether a rule keeps the draft token; the learned policy is decided by its caller."""
    p_draft = tl.exp(logprob_draft)
    p_top = tl.exp(logprob_top)
    if POLICY == TYPICAL:
        keep = p_draft > tl.minimum(second * tl.exp(-entropy), first)
    elif POLICY == RELAXED_TOPK:
        keep = (rank < first) & (p_draft >= p_top - second) & (first != 1.0) & (second != 0.0)
    elif POLICY == THRESHOLD:
        ratio = tl.minimum(acceptance_ratio, 1.0)
        by_ratio = (second < 1.0) & (ratio > 0.0) & (uniform <= ratio / second)
        keep = ((first < 1.0) & (p_draft >= first)) | by_ratio
    elif POLICY == CASCADE:
        keep = p_draft >= p_top * first
    elif POLICY == MARS:
        keep = (rank == 1) & (logit_top > 0.0) & (logit_draft > first * logit_top)
    elif POLICY == FLY:
        keep = (top_k_entropy >= first) & (remaining >= window) & (native_run >= window)
    elif POLICY == KL:
        keep = (kl <= first) & (p_top <= 0.9)
    elif POLICY == RANDOM:
        keep = coin(seed, output_position, draft_token, target_token) < first
    else:
        keep = rank < 0  # strict: nothing
    return keep
