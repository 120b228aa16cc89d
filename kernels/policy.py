"""What a policy is: its parameters, what it sees of a mismatch, and how it is found by its name.

A policy is a pydantic model of its parameters: a :class:`Rule`, whose ``keep`` maps :class:`Mismatches` to a mask, or
``Learned``, whose network the runner holds. The policies themselves are :mod:`vllm_cospec.kernels.policies`. Like every
configuration module this one imports no torch: the rules use methods of the tensors they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vllm_cospec.kernels.frozen import Frozen
from vllm_cospec.kernels.statistics import DRAFT_STATISTICS, INDEX

if TYPE_CHECKING:
    from torch import Tensor

JOINT = {"js": 1, "tv": 2, "mixture": 3}
"""What a rule can ask of both rows together, which costs a pass of its own over the rows of a mismatch."""


@dataclass(frozen=True)
class Mismatches:
    """What is known about M mismatches at the moment they are decided. Every tensor has M rows."""

    statistics: Tensor  # [M, 16] float32, see vllm_cospec.kernels.statistics
    target_logit_draft: Tensor  # [M] float32, raw target logit of d
    target_logit_top: Tensor  # [M] float32, raw target logit of t*
    draft_token: Tensor  # [M] int64, d
    target_token: Tensor  # [M] int64, t*
    output_position: Tensor  # [M] int64, index of the token in the response
    natively_accepted_after: Tensor  # [M] int64, consecutive following drafts strict verification accepts
    block_remaining: Tensor  # [M] int64, draft tokens of the block after this one
    acceptance_ratio: Tensor  # [M] float32, p(d) / q(d) of the processed distributions; 0 for greedy requests
    uniform: Tensor  # [M] float32, the number strict verification compared it with; 1 for greedy requests
    top_k_entropy: Callable[[int], Tensor]  # k -> [M] float32, -sum of p log p over the k most likely tokens
    divergence: Callable[[str], Tensor]  # "js" or "tv" -> [M] float32, of p and q, see Fsd
    mixture_lead: Callable[[float], Tensor]  # w -> [M] float32, of d over every other token in w p + (1 - w) q

    def __getitem__(self, name: str) -> Tensor:
        """Return one statistic of every mismatch, float32 [M]."""
        return self.statistics[:, INDEX[name]]


@dataclass(frozen=True)
class Numbers:
    """The parameters of a rule as its device code takes them."""

    first: float = 0.0
    second: float = 0.0
    seed: int = 0  # of the coin, weighted, modulo 2^32
    window: int = 0  # of drafts that follow
    top_k: int = 0  # how many of the target's largest logits the top-k entropy is taken over
    joint: int = 0  # what is taken of both rows together: one of JOINT, 0 for nothing


class Policy(Frozen):
    """What all policies have in common: immutable parameters, no unknown ones, a name and a code.

    A policy's name stands in its ``policy`` field alone, its code on the device in ``code``.
    """

    code: ClassVar[int]
    """Number of the policy in device code; unique."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Which of the statistics a decision depends on."""
    needs_draft_logits: ClassVar[bool] = False
    """Whether the policy is meaningless for drafters without logits."""
    weighs_drafts: ClassVar[bool] = False
    """Whether a decision on a sampled request depends on the probability with which its draft was drawn."""

    policy: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register every class that has a name."""
        name = cls.model_fields["policy"].default
        if isinstance(name, str):
            codes = {known.code: other for other, known in REGISTRY.items()}
            if codes.get(cls.code, name) != name:
                raise TypeError(f"{cls.__name__}: code {cls.code} belongs to policy {codes[cls.code]!r}")
            REGISTRY[name] = cls

    @property
    def arbiter(self) -> str | None:
        """Directory or hub id of the network that decides; None for a rule."""
        return None

    @property
    def looks_at_draft(self) -> bool:
        """Whether a decision depends on the draft's distribution, beyond the strict verdict on a sampled token."""
        return self.needs_draft_logits or not self.reads.isdisjoint(DRAFT_STATISTICS)

    @property
    def draws_drafts(self) -> bool:
        """Whether drafts of sampled requests are to be drawn, where the user does not say; else they are greedy."""
        return self.looks_at_draft or self.weighs_drafts

    def for_block_length(self, num_speculative_tokens: int) -> Self:
        """Return the policy with everything settled that depends on K.

        Raises:
            ValueError: one sentence that begins with the parameter's name.
        """
        return self

    def describe(self) -> str:
        """Return the policy and its parameters in a few words, for logs and tables."""
        parameters = ", ".join(f"{k}={v}" for k, v in self.model_dump(exclude={"policy"}).items())
        return f"{self.policy}({parameters})" if parameters else self.policy


REGISTRY: dict[str, type[Policy]] = {}
"""Every class with a name, by its name."""


def policy_names() -> tuple[str, ...]:
    """Return the names of all policies, as users write them in ``{"policy": NAME}``."""
    return tuple(REGISTRY)


def policy_class(name: str) -> type[Policy]:
    """Return the class of the policy with this name; raises KeyError."""
    return REGISTRY[name]


class Rule(Policy):
    """A policy without a network: its own code decides."""

    def keep(self, rows: Mismatches) -> Tensor:
        """Return a bool tensor [M]: True where the draft token is kept."""
        raise NotImplementedError

    def numbers(self) -> Numbers:
        """Return the parameters as the branch of :mod:`vllm_cospec.kernels.triton.policies` reads them."""
        return Numbers()
