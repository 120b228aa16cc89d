"""The road not taken at one mismatch of a response.

A request whose prompt ends just before the last token that was emitted before the mismatch's block finds itself in the
same block again: the target writes that token greedily, and where tokens are drawn it is put in its place, as the state
of the request's generator is. The decision at the mismatch is forced the other way. What follows uses the same random
numbers, unless the branch is one of several continuations of the same action.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from vllm_cospec.training.rollout.engine import Engine, Request, Response

LEAST_DOUBT = 0.1  # a mismatch the policy is sure of is chosen a tenth as often as one it is in two minds about


def choose(response: Response, count: int, rng: random.Random) -> list[tuple[Any, float]]:
    """Choose mismatches of a response to branch at, rather those the policy is unsure of.

    One whose block began with the response's very first token cannot be: no token stands before the block that a prompt
    could end with.

    Args:
        response: with its decisions.
        count: how many; all of them where there are fewer.
        rng: draws them.

    Returns:
        Decisions, and how many mismatches each stands for: one over the chance it had. Sums so weighted are on average
        those over all mismatches, however long a response is.
    """
    possible = [d for d in response.decisions if d.output_position > d.block_position]
    chances = _chances([_doubt(d.probability) for d in possible], count)
    # systematic sampling: as many are chosen as the chances add up to
    chosen, passed, mark = [], 0.0, rng.random()
    for decision, chance in zip(possible, chances, strict=True):
        passed += chance
        if passed > mark:
            chosen.append((decision, 1 / chance))
            mark += 1
    return chosen


def _doubt(probability: float | None) -> float:
    """Return how unsure a policy is that keeps with a probability: 1 at one half; 1 for a rule, which says nothing."""
    return 1.0 if probability is None else max(LEAST_DOUBT, 4 * probability * (1 - probability))


def _chances(doubts: list[float], count: int) -> list[float]:
    """Return chances in proportion to doubts that add up to ``count``, none above 1."""
    chances = [1.0] * len(doubts)
    open_, left = set(range(len(doubts))), count
    while len(open_) > left:
        scale = left / sum(doubts[i] for i in open_)
        full = {i for i in open_ if doubts[i] * scale >= 1}
        if not full:
            return [doubts[i] * scale if i in open_ else 1.0 for i in range(len(doubts))]
        open_, left = open_ - full, left - len(full)
    return chances


def written_before(decision: Any) -> int:
    """Return how many tokens of the response a branch at ``decision`` begins with: all but the one before its block."""
    return decision.output_position - decision.block_position - 1


def branch_request(
    request: Request, response: Response, decision: Any, keep: bool, reseed: int | None = None
) -> Request:
    """Return the request that takes a road at ``decision``.

    Args:
        request: the response's.
        response: the one that was written.
        decision: one of its mismatches.
        keep: whether the draft's token is kept there.
        reseed: draw what follows the block with random numbers of its own, where the request draws any.
    """
    written = written_before(decision)
    drawn: dict[str, Any] = {}
    if request.temperature > 0:
        drawn = {"first_token": response.tokens[written], "generator": decision.generator, "reseed": reseed}
    return Request(
        prompt=request.prompt + response.tokens[:written],
        max_tokens=request.max_tokens - written,
        seed=request.seed,
        temperature=request.temperature,
        top_p=request.top_p,
        extra=request.extra
        | {
            "cospec_branch": {
                "written": written,
                "overrides": sum(d.kept for d in response.decisions if d.output_position <= written),
                "decided_at": decision.output_position,
                "keep": keep,
                **drawn,
            }
        },
    )


def joined(engine: Engine, response: Response, decision: Any, branch: Response) -> Response | None:
    """Return the whole response of which ``branch`` is the end; None when it left the road before the mismatch."""
    written = written_before(decision)
    until = decision.output_position - written
    if branch.tokens[:until] != response.tokens[written : written + until]:
        return None
    if not any(d.output_position == decision.output_position for d in branch.decisions):
        return None
    tokens = response.tokens[:written] + branch.tokens
    ends = np.cumsum(response.emitted)
    before = int(np.searchsorted(ends, written + 1)) + 1  # the branch's first token ended one of these steps
    return Response(
        tokens=tokens,
        text=engine.decode(tokens),
        emitted=[*response.emitted[:before], *branch.emitted[1:]],
        capped=branch.capped,
    )
