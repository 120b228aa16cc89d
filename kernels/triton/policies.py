"""The policies as device code: one branch each, chosen at compile time.

What a rule means is said in :mod:`vllm_cospec.kernels.policies`; here every rule sees the same scalars of one mismatch.
The learned policy is a network of one or two hidden layers, evaluated in float32 by one program:

    x' = clamp((x - mean) / scale),   h = relu(W1 x' + b1),   h' = relu(W2 h + b2),   score = sigmoid(w . h' + b)

Its weights lie in one float32 vector, layer after layer, so that new ones can be copied in without a launch changing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

from vllm_cospec.kernels import policies
from vllm_cospec.kernels.policies import Numbers, Policy, Rule
from vllm_cospec.kernels.statistics import INPUT_LIMIT
from vllm_cospec.kernels.triton import layout
from vllm_cospec.kernels.triton.layout import STATISTICS

TYPICAL, RELAXED_TOPK, THRESHOLD, CASCADE, MARS, FLY, KL, RANDOM, LEARNED, ENTROPY, EARS, MIXTURE, FSD = (
    tl.constexpr(policy.code)
    for policy in (
        policies.Typical, policies.RelaxedTopK, policies.Threshold, policies.Cascade, policies.Mars, policies.Fly,
        policies.Kl, policies.Random, policies.Learned, policies.Entropy, policies.Ears, policies.Mixture, policies.Fsd,
    )
)  # fmt: skip
_LIMIT = tl.constexpr(INPUT_LIMIT)
_KEPT = tl.constexpr(4096)  # floats of a second layer that the registers of four warps keep
_TILE = tl.constexpr(16)  # rows of a larger one at a time, which has 256 columns at most
_EARS_FLOOR = tl.constexpr(policies.EARS_FLOOR)
_COIN_POSITION, _COIN_DRAFT, _COIN_TARGET = map(
    tl.constexpr, (policies.COIN_POSITION, policies.COIN_DRAFT, policies.COIN_TARGET)
)


@dataclass(frozen=True)
class Program:
    """A policy as the kernels take it."""

    code: int
    numbers: Numbers = field(default_factory=Numbers)
    hidden: tuple[int, int] = (1, 0)  # widths of the learned network, 0 for no second layer
    weights: Tensor | None = None  # [number of weights] float32, on the device
    extra: int = field(default_factory=lambda: layout.NOTHING.value)  # which statistic the first pass takes besides
    rereads: bool = False  # whether rejected rows are read again
    reads_draft: bool = False  # whether the draft's row is read beside them
    collect: bool = False  # return a trace
    sample_actions: bool = False  # training: keep with the score as probability, do not compare it with the threshold


def compile_policy(policy: Policy, device: torch.device, arbiter: Any = None, collect: bool = False) -> Program:
    """Translate a policy.

    Args:
        policy: with everything settled that depends on K.
        device: where the weights go.
        arbiter: the network, where the policy has one.
        collect: statistics are wanted whatever the policy reads, so all are computed.
    """
    numbers = policy.numbers() if isinstance(policy, Rule) else Numbers()
    extra, rereads = _passes(policy.reads, numbers, collect)
    program = Program(
        policy.code, numbers, extra=extra, rereads=rereads or bool(numbers.joint), collect=collect,
        reads_draft=collect or policy.looks_at_draft,
    )  # fmt: skip
    if policy.arbiter is None:
        return program
    sizes = tuple(arbiter.hidden_sizes)
    return replace(
        program,
        hidden=(sizes[0], sizes[1] if len(sizes) > 1 else 0),
        weights=flatten_weights(arbiter.state_dict()).to(device),
    )


def _passes(reads: frozenset[str], numbers: Numbers, collect: bool) -> tuple[int, bool]:
    """Return what the first pass takes besides, and whether rejected rows are read again for the rest."""
    first_pass = {"target_entropy": layout.ENTROPY.value, "target_rank_draft": layout.RANK.value}
    wanted = reads - {"target_logprob_draft", "target_logprob_top"}
    if numbers.top_k:
        return layout.TOP_K.value, collect or bool(wanted)
    if collect or len(wanted) > 1 or not wanted <= first_pass.keys():
        return layout.NOTHING.value, True
    return next((first_pass[name] for name in wanted), layout.NOTHING.value), False


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
def network_weights(
    weights_ptr,
    HIDDEN_1: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    PADDED_1: tl.constexpr,
    PADDED_2: tl.constexpr,
):
    """The learned policy's weights, asked for at once: in the middle of a decision their reads would wait in turn.

    -> mean and scale [16]; weight [PADDED_1, 16] and bias of the first layer; what of the second is kept, weight
    [PADDED_2, PADDED_1] or nothing where it is too large; bias and weight of the last, which follow it.
    """
    column, unit, row = tl.arange(0, STATISTICS), tl.arange(0, PADDED_1), tl.arange(0, PADDED_2)
    present, there = unit < HIDDEN_1, row < HIDDEN_2
    first_ptr = weights_ptr + 2 * STATISTICS
    weight = tl.load(first_ptr + unit[:, None] * STATISTICS + column[None, :], mask=present[:, None], other=0.0)
    first_ptr += HIDDEN_1 * STATISTICS
    bias = tl.load(first_ptr + unit, mask=present, other=0.0)
    second_ptr = first_ptr + HIDDEN_1
    second = 0.0
    if HIDDEN_2 == 0:
        out = tl.load(second_ptr + unit, mask=present, other=0.0)
        second_bias = 0.0
        last = tl.load(second_ptr + HIDDEN_1)
    else:
        if PADDED_1 * PADDED_2 <= _KEPT:
            place = row[:, None] * HIDDEN_1 + unit[None, :]
            second = tl.load(second_ptr + place, mask=there[:, None] & present[None, :], other=0.0)
        bias_ptr = second_ptr + HIDDEN_2 * HIDDEN_1
        second_bias = tl.load(bias_ptr + row, mask=there, other=0.0)
        out = tl.load(bias_ptr + HIDDEN_2 + row, mask=there, other=0.0)
        last = tl.load(bias_ptr + 2 * HIDDEN_2)
    mean, scale = tl.load(weights_ptr + column), tl.load(weights_ptr + STATISTICS + column)
    return mean, scale, weight, bias, second, second_bias, out, last


@triton.jit
def network_score(
    statistics,  # [16] float32
    network,  # of `network_weights`
    weights_ptr,
    HIDDEN_1: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    PADDED_1: tl.constexpr,
    PADDED_2: tl.constexpr,
):
    """The learned policy's score of one mismatch, in (0, 1)."""
    mean, scale, weight, bias, second, second_bias, out, logit = network
    x = tl.minimum(tl.maximum((statistics - mean) / scale, -_LIMIT), _LIMIT)
    hidden = tl.maximum(tl.sum(weight * x[None, :], axis=1) + bias, 0.0)
    if HIDDEN_2 == 0:
        logit += tl.sum(hidden * out, axis=0)
    elif PADDED_1 * PADDED_2 <= _KEPT:
        values = tl.sum(second * hidden[None, :], axis=1) + second_bias
        logit += tl.sum(tl.maximum(values, 0.0) * out, axis=0)
    else:
        unit = tl.arange(0, PADDED_1)
        weights_ptr += 2 * STATISTICS + HIDDEN_1 * (STATISTICS + 1)
        bias_ptr = weights_ptr + HIDDEN_2 * HIDDEN_1
        for first in range(0, PADDED_2, _TILE):
            row = first + tl.arange(0, _TILE)
            there = row < HIDDEN_2
            place = row[:, None] * HIDDEN_1 + unit[None, :]
            tile = tl.load(weights_ptr + place, mask=there[:, None] & (unit < HIDDEN_1)[None, :], other=0.0)
            values = tl.sum(tile * hidden[None, :], axis=1) + tl.load(bias_ptr + row, mask=there, other=0.0)
            last = tl.load(bias_ptr + HIDDEN_2 + row, mask=there, other=0.0)
            logit += tl.sum(tl.maximum(values, 0.0) * last, axis=0)
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def rule_keeps(
    logprob_draft,  # log p(d)
    logprob_top,  # log p(t*)
    entropy,
    rank,  # of d, from 0, float32
    logit_draft,  # raw
    logit_top,  # raw
    top_k_entropy,
    kl,
    logprob_in_draft,  # log q(d)
    joint,  # of both rows, see vllm_cospec.kernels.triton.joint
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
        keep = (rank == 1.0) & (logit_top > 0.0) & (logit_draft > first * logit_top)
    elif POLICY == FLY:
        keep = (top_k_entropy >= first) & (remaining >= window) & (native_run >= window)
    elif POLICY == KL:
        keep = (kl <= first) & (p_top <= 0.9)
    elif POLICY == RANDOM:
        keep = coin(seed, output_position, draft_token, target_token) < first
    elif POLICY == ENTROPY:
        factor = tl.minimum(tl.exp(-first * entropy), second)
        keep = (acceptance_ratio > 0.0) & (acceptance_ratio >= uniform * factor)
    elif POLICY == EARS:
        bound = tl.maximum(uniform - first * (1.0 - p_top), _EARS_FLOOR)
        keep = (acceptance_ratio > 0.0) & (acceptance_ratio >= bound)
    elif POLICY == MIXTURE:
        if (acceptance_ratio == 0.0) & (uniform == 1.0):  # greedy
            keep = first * p_draft + (1.0 - first) * tl.exp(logprob_in_draft) >= joint
        else:
            keep = uniform <= 1.0 - first + first * acceptance_ratio
    elif POLICY == FSD:
        keep = joint <= first
    else:
        keep = rank < 0.0  # strict: nothing
    return keep
