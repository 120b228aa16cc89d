"""Rows of logits for the tests of acceptance rules, and the scalar vocabulary of their statements."""

import math
from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from vllm_cospec.kernels.cpu import divergence, logit_statistics, mixture_lead, top_k_entropy
from vllm_cospec.kernels.policies import AnyPolicy, Mismatches, Rule

INF = math.inf
MARGIN = 1e-4  # float32 probabilities are good to 1e-6, divergences of a few terms of up to 100 each to 3e-5

quick = settings(max_examples=60, deadline=None, derandomize=True)
TYPE_ADAPTER: TypeAdapter = TypeAdapter(AnyPolicy)


# Rows: (target logits, draft logits, draft token), all exactly representable in float32.


def logit_rows(size: int) -> st.SearchStrategy[list[float]]:
    """One row of logits: smooth, full of ties, with -inf, one-hot, or saturated. Never without a finite entry."""
    smooth = st.floats(-8, 8, width=32, allow_subnormal=False)  # no product of subnormals has a relative precision
    ties = st.integers(-2, 2).map(float)

    def row(entry: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
        return st.lists(entry, min_size=size, max_size=size)

    def one_hot(hot: int, others: float, value: float) -> list[float]:
        return [value if i == hot else others for i in range(size)]

    index = st.integers(0, size - 1)
    return st.one_of(
        row(smooth),
        row(ties),
        row(smooth.map(lambda x: x - 20)),  # no positive logit
        row(st.one_of(smooth, st.just(-INF))).filter(lambda r: max(r) > -INF),
        st.builds(one_hot, index, st.just(-INF), smooth),
        st.builds(one_hot, index, st.sampled_from([-1e4, 0.0, 5.0]), st.sampled_from([12.0, 1e4])),
    )


@st.composite
def mismatch_rows(draw: st.DrawFn) -> list[tuple[list[float], list[float], int]]:
    """Up to three rows of one vocabulary; d is any token, the target's argmax included."""
    size = draw(st.integers(2, 8))
    row = st.tuples(logit_rows(size), logit_rows(size), st.integers(0, size - 1))
    return draw(st.lists(row, min_size=1, max_size=3))


def mismatches(
    rows: list[tuple[list[float], list[float], int]],
    acceptance_ratio: list[float] | None = None,
    uniform: list[float] | None = None,
    natively_accepted_after: int = 0,
    block_remaining: int = 0,
) -> Mismatches:
    """Build what the CPU path hands to a policy, greedy unless told otherwise."""
    target, draft = torch.tensor([t for t, _, _ in rows]), torch.tensor([q for _, q, _ in rows])
    token, top = torch.tensor([d for _, _, d in rows]), target.argmax(dim=-1)
    statistics = torch.zeros(len(rows), 16)
    statistics[:, :10] = logit_statistics(target, draft, token, top)
    every = torch.arange(len(rows))
    return Mismatches(
        statistics=statistics,
        target_logit_draft=target[every, token],
        target_logit_top=target[every, top],
        draft_token=token,
        target_token=top,
        output_position=torch.zeros(len(rows), dtype=torch.int64),
        natively_accepted_after=torch.full((len(rows),), natively_accepted_after),
        block_remaining=torch.full((len(rows),), block_remaining),
        acceptance_ratio=torch.zeros(len(rows)) if acceptance_ratio is None else torch.tensor(acceptance_ratio),
        uniform=torch.ones(len(rows)) if uniform is None else torch.tensor(uniform),
        top_k_entropy=lambda k: top_k_entropy(target, k),
        divergence=lambda kind: divergence(target, draft, kind),
        mixture_lead=lambda weight: mixture_lead(target, draft, token, weight),
    )


def one(target: list[float], draft_token: int, draft: list[float] | None = None) -> Mismatches:
    return mismatches([(target, draft or target, draft_token)])


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p > 0 else -INF for p in probabilities]


# The scalar vocabulary of the statements.


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def entropy(ps: list[float]) -> float:
    return -sum(p * math.log(p) for p in ps if p > 0)


def order(logits: list[float]) -> list[int]:
    """Tokens from the most to the least likely; of equals the lower index comes first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def agrees(policy: Rule, rows: list, statement: Callable[..., float], **context: list[float]) -> None:
    """Check a policy against the margins of its statement, where they are clear."""
    kept = policy.keep(mismatches(rows, **context))  # type: ignore[arg-type]
    assert kept.dtype == torch.bool
    assert kept.shape == (len(rows),)
    for i, (target, draft, token) in enumerate(rows):
        margin = statement(target, draft, token, **{name: values[i] for name, values in context.items()})
        if abs(margin) > MARGIN:
            assert bool(kept[i]) == (margin > 0), (target, draft, token, margin)
