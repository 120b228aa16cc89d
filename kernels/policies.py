"""Policies: the rules that decide at a mismatch whether the draft token is kept.

They are consulted only where strict verification would reject, and only where keeping the draft is legal. What all of
them have in common is :mod:`vllm_cospec.kernels.policy`.

p, q, d and t* are defined in :mod:`vllm_cospec.kernels.statistics`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import Field

from vllm_cospec.kernels.policy import (  # noqa: F401 - some are for those who import this module
    JOINT,
    REGISTRY,
    Mismatches,
    Numbers,
    Policy,
    Rule,
    policy_class,
    policy_names,
)
from vllm_cospec.kernels.statistics import NAMES

if TYPE_CHECKING:
    from torch import Tensor


class Strict(Rule):
    """Stock verification: every mismatch takes the target's token (arXiv 2211.17192)."""

    code: ClassVar[int] = 0

    policy: Literal["strict"] = "strict"

    def keep(self, rows: Mismatches) -> Tensor:
        return rows["target_entropy"] < -1  # entropy is never negative: keeps nothing


class Typical(Rule):
    """Keep d when p(d) > min(posterior_threshold, posterior_alpha * exp(-H(p))) (Medusa, arXiv 2401.10774)."""

    code: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset({"target_logprob_draft", "target_entropy"})

    policy: Literal["typical"] = "typical"
    posterior_threshold: float = Field(0.09, ge=0, le=1)
    """The probability that always suffices (epsilon)."""
    posterior_alpha: float = Field(0.3, ge=0)
    """Scale of the entropy-dependent threshold (delta)."""

    def keep(self, rows: Mismatches) -> Tensor:
        threshold = (self.posterior_alpha * (-rows["target_entropy"]).exp()).clamp(max=self.posterior_threshold)
        return rows["target_logprob_draft"].exp() > threshold

    def numbers(self) -> Numbers:
        return Numbers(self.posterior_threshold, self.posterior_alpha)


class RelaxedTopK(Rule):
    """Keep d when it is among the target's first ``top_n`` and p(d) >= p(t*) - delta (TensorRT-LLM)."""

    code: ClassVar[int] = 2
    reads: ClassVar[frozenset[str]] = frozenset({"target_logprob_draft", "target_logprob_top", "target_rank_draft"})

    policy: Literal["relaxed_topk"] = "relaxed_topk"
    top_n: int = Field(10, ge=1, le=2**31 - 1)
    """How many of the target's choices qualify; 1 is strict."""
    delta: float = Field(0.6, ge=0, le=1)
    """How far below the target's first choice the draft may lie; 0 is strict."""

    def keep(self, rows: Mismatches) -> Tensor:
        if self.top_n == 1 or self.delta == 0:
            return rows["target_entropy"] < -1
        ranked = rows["target_rank_draft"] < math.log1p(self.top_n - 0.5)  # rank <= top_n - 1, safe from rounding
        close = rows["target_logprob_draft"].exp() >= rows["target_logprob_top"].exp() - self.delta
        return ranked & close

    def numbers(self) -> Numbers:
        return Numbers(self.top_n, self.delta)


class Threshold(Rule):
    """Keep d when p(d) >= single or, for sampled requests, u <= min(1, p(d)/q(d)) / acc (SGLang)."""

    code: ClassVar[int] = 3
    reads: ClassVar[frozenset[str]] = frozenset({"target_logprob_draft"})

    policy: Literal["threshold"] = "threshold"
    single: float = Field(1.0, gt=0, le=1)
    """Target probability that suffices; 1 is strict."""
    acc: float = Field(1.0, gt=0, le=1)
    """Divisor of the acceptance probability of sampled requests; 1 is strict."""

    def keep(self, rows: Mismatches) -> Tensor:
        keep = rows["target_logprob_draft"].exp() >= self.single
        if self.single == 1:  # float32 rounds p(d) up to 1 on saturated rows
            keep = keep & False
        if self.acc < 1:
            ratio = rows.acceptance_ratio.clamp(max=1)
            keep = keep | ((rows.uniform <= ratio / self.acc) & (ratio > 0))
        return keep

    def numbers(self) -> Numbers:
        return Numbers(self.single, self.acc)


class Cascade(Rule):
    """Keep d when p(d) >= max p * (1 - alpha) (speculative cascades, TokenV3, arXiv 2405.19261)."""

    code: ClassVar[int] = 4
    reads: ClassVar[frozenset[str]] = frozenset({"target_logprob_draft", "target_logprob_top"})

    policy: Literal["cascade"] = "cascade"
    alpha: float = Field(ge=0, le=1)
    """Share of the target's best probability that may be given up; 0 is strict but for ties, 1 keeps everything."""

    def keep(self, rows: Mismatches) -> Tensor:
        floor = rows["target_logprob_top"].exp() * (1 - self.alpha)
        return rows["target_logprob_draft"].exp() >= floor

    def numbers(self) -> Numbers:
        return Numbers(1 - self.alpha)


class Mars(Rule):
    """Keep d when it is the target's second choice and z(d) / z(t*) > ratio on raw logits (arXiv 2601.15498).

    The ratio of logits has a meaning only above zero: a row whose best logit is not positive is strict.
    """

    code: ClassVar[int] = 5
    reads: ClassVar[frozenset[str]] = frozenset({"target_rank_draft"})

    policy: Literal["mars"] = "mars"
    ratio: float = Field(0.9, ge=0, le=1)
    """Ratio of logits that must be exceeded."""

    def keep(self, rows: Mismatches) -> Tensor:
        rank = rows["target_rank_draft"]
        second = (rank > math.log1p(0.5)) & (rank < math.log1p(1.5))
        top = rows.target_logit_top
        return second & (top > 0) & (rows.target_logit_draft > self.ratio * top)

    def numbers(self) -> Numbers:
        return Numbers(self.ratio)


class Fly(Rule):
    """Keep d when the target is unsure and the next drafts are accepted natively (FLy, arXiv 2511.22972).

    Unsure: entropy over the ``entropy_top_k`` most likely tokens >= ``entropy_threshold``. vLLM 0.33 offers the rule
    as ``rejection_sample_method: "fly"``; here the entropy is that of the raw target distribution.
    """

    code: ClassVar[int] = 6

    policy: Literal["fly"] = "fly"
    entropy_top_k: int = Field(3, ge=1, le=4)
    """Number of most likely tokens whose entropy is taken; more would cost as much as the rest of verification."""
    entropy_threshold: float = Field(0.3, ge=0)
    """Entropy in nats from which on the target counts as unsure."""
    window: int | None = Field(None, ge=1, le=127)
    """Following drafts that must be accepted natively; left out: min(6, K - 1)."""

    def for_block_length(self, num_speculative_tokens: int) -> Self:
        window = self.window or min(6, num_speculative_tokens - 1)
        if not 1 <= window < num_speculative_tokens:
            raise ValueError(
                f"window: {self.window} does not fit num_speculative_tokens={num_speculative_tokens}; "
                f"fly needs 1 <= window < num_speculative_tokens"
            )
        return self.model_copy(update={"window": window})

    def _window(self) -> int:
        if self.window is None:
            raise ValueError("fly: window must be resolved against num_speculative_tokens first")
        return self.window

    def keep(self, rows: Mismatches) -> Tensor:
        window = self._window()
        unsure = rows.top_k_entropy(self.entropy_top_k) >= self.entropy_threshold
        deferred = (rows.block_remaining >= window) & (rows.natively_accepted_after >= window)
        return unsure & deferred

    def numbers(self) -> Numbers:
        return Numbers(self.entropy_threshold, window=self._window(), top_k=self.entropy_top_k)


class Kl(Rule):
    """Keep d when KL(q || p) <= max_kl and p(t*) <= 0.9 (arXiv 2601.04766)."""

    code: ClassVar[int] = 7
    reads: ClassVar[frozenset[str]] = frozenset({"target_logprob_top", "kl_draft_target"})
    needs_draft_logits: ClassVar[bool] = True

    policy: Literal["kl"] = "kl"
    max_kl: float = Field(ge=0)
    """Largest divergence, in nats, at which the draft is trusted."""

    def keep(self, rows: Mismatches) -> Tensor:
        return (rows["kl_draft_target"] <= self.max_kl) & (rows["target_logprob_top"].exp() <= 0.9)

    def numbers(self) -> Numbers:
        return Numbers(self.max_kl)


class Random(Rule):
    """Keep d with a fixed probability: the control that shows what noise at the same rate does.

    The coin is a hash of (seed, output position, d, t*): it needs no state and is the same on every rank.
    """

    code: ClassVar[int] = 8

    policy: Literal["random"] = "random"
    rate: float = Field(ge=0, le=1)
    """Probability of keeping a mismatched draft token."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the coins."""

    def keep(self, rows: Mismatches) -> Tensor:
        return coin(self.seed, rows.output_position, rows.draft_token, rows.target_token) < self.rate

    def numbers(self) -> Numbers:
        return Numbers(self.rate, seed=self.seed * COIN_SEED & 0xFFFFFFFF)


class Learned(Policy):
    """Keep d when the arbiter's score exceeds the threshold (CoSpec, arXiv 2605.24793).

    The network, its statistics and its training are this project's own design, built from the paper's abstract and a
    digest of it; the text of its method was not used.
    """

    code: ClassVar[int] = 9
    reads: ClassVar[frozenset[str]] = frozenset(NAMES)

    policy: Literal["learned"] = "learned"
    artefact: str
    """Directory or hub id of the arbiter."""

    @property
    def arbiter(self) -> str | None:
        return self.artefact


class Entropy(Rule):
    """Sampled requests: keep d when p(d)/q(d) >= u min(exp(-posterior_alpha H(p)), posterior_threshold).

    vLLM Ascend's ``enable_entropy_verify`` (vllm-ascend #9772): strict verification's own number u counts for less
    where the target is unsure. Greedy requests are strict, as there.
    """

    code: ClassVar[int] = 10
    reads: ClassVar[frozenset[str]] = frozenset({"target_entropy"})
    weighs_drafts: ClassVar[bool] = True

    policy: Literal["entropy"] = "entropy"
    posterior_threshold: float = Field(0.95, gt=0, le=1)
    """What u is multiplied with where the target is sure."""
    posterior_alpha: float = Field(0.4, ge=0)
    """How fast that falls with the entropy; 0 leaves ``posterior_threshold`` alone."""

    def keep(self, rows: Mismatches) -> Tensor:
        factor = (-self.posterior_alpha * rows["target_entropy"]).exp().clamp(max=self.posterior_threshold)
        ratio = rows.acceptance_ratio
        return (ratio > 0) & (ratio >= rows.uniform * factor)

    def numbers(self) -> Numbers:
        return Numbers(self.posterior_alpha, self.posterior_threshold)


class Ears(Rule):
    """Sampled requests: keep d when p(d)/q(d) >= u - tolerance (1 - p(t*)) (EARS, arXiv 2512.13194).

    As in its implementation for vLLM (vllm-ascend #7845) the right side is at least 2^-23, so that a ratio of 0 never
    passes. Greedy requests are strict, as there.
    """

    code: ClassVar[int] = 11
    reads: ClassVar[frozenset[str]] = frozenset({"target_logprob_top"})
    weighs_drafts: ClassVar[bool] = True

    policy: Literal["ears"] = "ears"
    tolerance: float = Field(ge=0, le=1)
    """How much of the target's uncertainty is forgiven (beta); 0 is strict."""

    def keep(self, rows: Mismatches) -> Tensor:
        bound = rows.uniform - self.tolerance * (1 - rows["target_logprob_top"].exp())
        ratio = rows.acceptance_ratio
        return (ratio > 0) & (ratio >= bound.clamp(min=EARS_FLOOR))

    def numbers(self) -> Numbers:
        return Numbers(self.tolerance)


class Mixture(Rule):
    """Verify against v = weight p + (1 - weight) q: speculative ensembles with a fixed weight (arXiv 2604.07622).

    Sampled requests: keep d when u <= v(d)/q(d), that is 1 - weight + weight p(d)/q(d). Greedy ones: when no token is
    more likely than d in v. transformers' ``assistant_ensemble_weight`` (#45979).
    """

    code: ClassVar[int] = 12
    needs_draft_logits: ClassVar[bool] = True

    policy: Literal["mixture"] = "mixture"
    weight: float = Field(gt=0, le=1)
    """Share of the target; 1 is strict but for ties."""

    def keep(self, rows: Mismatches) -> Tensor:
        greedy = (rows.acceptance_ratio == 0) & (rows.uniform == 1)
        drawn = rows.uniform <= 1 - self.weight + self.weight * rows.acceptance_ratio
        return (greedy & (rows.mixture_lead(self.weight) >= 0)) | (~greedy & drawn)

    def numbers(self) -> Numbers:
        return Numbers(self.weight, joint=JOINT["mixture"])


class Fsd(Rule):
    """Keep d when the two distributions differ by ``max_divergence`` at most (FSD, arXiv 2502.20704).

    "js": Jensen-Shannon divergence, the mean of KL(p || m) and KL(q || m) with m = (p + q) / 2, in nats. "tv": total
    variation, half the sum of |p - q|. There every draft is judged so; here those strict verification rejects. The rule
    with KL(q || p) is ``kl``.
    """

    code: ClassVar[int] = 13
    needs_draft_logits: ClassVar[bool] = True

    policy: Literal["fsd"] = "fsd"
    divergence: Literal["js", "tv"] = "js"
    """Which of them."""
    max_divergence: float = Field(ge=0, le=1)
    """Largest divergence at which the draft is trusted."""

    def keep(self, rows: Mismatches) -> Tensor:
        return rows.divergence(self.divergence) <= self.max_divergence

    def numbers(self) -> Numbers:
        return Numbers(self.max_divergence, joint=JOINT[self.divergence])


AnyPolicy: Any = Annotated[Union[tuple(REGISTRY.values())], Field(discriminator="policy")]  # noqa: UP007
"""The discriminated union of all policies, for use as a pydantic field type."""

EARS_FLOOR = 2.0**-23  # float32's epsilon

COIN_SEED, COIN_POSITION, COIN_DRAFT, COIN_TARGET = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F
"""Weights of what the coin of :class:`Random` is a hash of."""


def coin(seed: int, output_position: Tensor, draft_token: Tensor, target_token: Tensor) -> Tensor:
    """Hash four integers to a float32 in [0, 1): murmur3's 32-bit finaliser over a weighted sum.

    Shapes [M] int64 in, [M] float32 out. Int64 arithmetic wraps, and only the low 32 bits are kept at each step.
    """
    x = (
        (seed * COIN_SEED & 0xFFFFFFFF)
        + output_position * COIN_POSITION
        + draft_token * COIN_DRAFT
        + target_token * COIN_TARGET
    )
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x >> 8).float() / 2**24
