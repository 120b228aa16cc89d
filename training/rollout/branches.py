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


def choose(response: Response, count: int, rng: random.Random) -> list[Any]:
    """Choose mismatches of a response to branch at, each with the same chance.

    One whose block began with the response's very first token cannot be: no token stands before the block that a prompt
    could end with.
    """
    possible = [d for d in response.decisions if d.output_position > d.block_position]
    return rng.sample(possible, min(count, len(possible)))


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
    drawn = (
        {}
        if request.temperature == 0
        else {
            "first_token": response.tokens[written],
            "generator": decision.generator,
            "reseed": reseed,
        }
    )
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
