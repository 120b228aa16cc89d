"""Prints which compiled programs ``warm_up`` covers and which a server's steps reach: ``python -m launch_keys JOBS``.

A program is identified as Triton's own just-in-time compiler identifies it: argument types, alignment, constants and
options, on an NVIDIA target. Nothing is compiled and nothing runs: launches are recorded.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from vllm_cospec.kernels.triton.stand_in import install

install()
sys.path.insert(0, str(Path(__file__).parents[3]))

import torch  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from benchmarks import variants  # noqa: E402
from benchmarks.offline import TARGETS, Launch, recorded_launches  # noqa: E402
from vllm_cospec.kernels.reach import STOPS  # noqa: E402
from vllm_cospec.kernels.scores import NUM_BINS  # noqa: E402
from vllm_cospec.kernels.triton.launch import LARGE, ServerShapes, arbitrate, arbitrate_given, warm_up  # noqa: E402
from vllm_cospec.kernels.triton.policies import Program, compile_policy  # noqa: E402
from vllm_cospec.kernels.triton.step import Memory, Rows, Sampling, Slots, Verdict  # noqa: E402
from vllm_cospec.kernels.triton.workspace import Workspace  # noqa: E402

CPU = torch.device("cpu")
SLOTS = 9
FLOATS = ("threshold", "max_regret", "regret_so_far")


def key(one: Launch, target: str) -> str:
    """What Triton looks a compiled program up by."""
    binder = create_function_from_signature(one.kernel.signature, one.kernel.params, make_backend(TARGETS[target]))
    options: dict[str, Any] = {"num_warps": one.num_warps}
    if target == "sm_90":  # the other compiler does not know it
        options["maxnreg"] = one.maxnreg
    _, specialization, _ = binder(**one.arguments, **options)
    return f"{target} {one.name} {specialization} {options}"


def ours(launches: list[Launch]) -> set[str]:
    """Keys of the launches of our kernels; stock's are stock's affair."""
    return {key(one, target) for one in launches if not one.name.startswith("_") for target in ("sm_90", "gfx942")}


def step(
    server: ServerShapes,
    program: Program,
    counts: list[int],
    first_row: int,
    padded: bool,
    separate: bool,
    form: int | None,
    large: bool,
) -> None:
    """Launch one step of a batch that is a chunk, from ``first_row`` on, of a larger one, as the runners do.

    Args:
        counts: rows of each request.
        padded: rows of logits are cut out of rows of a multiple of 64, as vLLM's models hand them over.
        separate: processed logits are a copy.
        form: which form a given verdict has; None: strict verification is ours.
        large: the rows of logits are part of more than 2 GiB.
    """
    batch, total = len(counts), first_row + sum(counts)

    def chunk(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(total, *shape, dtype=dtype)[first_row:]

    width = -(-server.vocab_size // 64) * 64 if padded else server.vocab_size
    beyond = LARGE // (width * server.dtype.itemsize) + 1 if large else 0
    logits = torch.empty(total + beyond, width, dtype=server.dtype)[first_row:total, : server.vocab_size]
    rows = Rows(
        logits, torch.zeros(logits.shape) if separate else logits, server.draft_logits,
        drafted=chunk(dtype=torch.int32),
        first=torch.cat([torch.zeros(1), torch.tensor(counts).cumsum(0)]).to(torch.int32),
        position=chunk(dtype=torch.int64),
        request_slot=torch.zeros(batch + 1, dtype=torch.int64)[1:],
        slot=chunk(dtype=torch.int64),
        step=chunk(dtype=torch.int32),
        num_steps=server.num_steps,
    )  # fmt: skip
    slots = Slots(
        **{
            name: torch.zeros(SLOTS, dtype=torch.float32 if name in FLOATS else torch.int32)
            for name in Slots.__dataclass_fields__
            if name not in ("scores", "ends")
        },
        ends=torch.zeros(SLOTS, 1 + STOPS, dtype=torch.int32),
        scores=torch.zeros(NUM_BINS, SLOTS, dtype=torch.int32).T if server.counts_scores else None,
    )
    counters = torch.zeros(server.num_steps + 1, dtype=torch.int64)
    memory = Memory(counters, Workspace(CPU, server.vocab_size, total, batch))
    if form is None:
        sampling = Sampling(torch.zeros(SLOTS), torch.zeros(SLOTS, dtype=torch.int64))
        arbitrate(rows, sampling, slots, program, memory)
    else:
        arbitrate_given(rows, given(server, sum(counts) - batch, batch, form), slots, program, memory)


def given(server: ServerShapes, drafts: int, batch: int, form: int) -> Verdict:
    """A verdict of one of the forms that :meth:`ServerShapes.verdicts` knows, on as many drafts."""
    drawn = torch.zeros(drafts) if server.verdicts()[form].ratio is not None else None
    return Verdict(
        torch.ones(drafts, dtype=torch.int32),
        torch.zeros(drafts + 3, dtype=torch.int64)[3:],  # part of a larger tensor
        torch.ones(drafts, dtype=torch.bool),
        torch.zeros(drafts, dtype=torch.int64),
        torch.ones(drafts, dtype=torch.bool),
        torch.zeros(SLOTS, dtype=torch.int64),
        drawn,
        drawn,
    )


def missed(
    v1: bool, vocab: int, k: int, dtype: torch.dtype, has_draft: bool, large: bool = False
) -> tuple[int, list[str]]:
    """Return how many programs the steps of a server reach, and those among them that ``warm_up`` left out."""
    reached, left_out = set(), set()
    draft = torch.zeros(SLOTS, k, vocab, dtype=dtype) if has_draft else None
    for policy, arbiter in variants.policies(k):
        server = ServerShapes(
            vocab, dtype, draft, k, CPU, given_verdict=v1, counts_scores=arbiter is not None, large_logits=large
        )
        if policy.needs_draft_logits and not has_draft:
            continue
        for collect in (False, True):
            program = compile_policy(policy, CPU, arbiter, collect)
            with recorded_launches(*variants.MODULES) as warm:
                warm_up(server, program)
            with recorded_launches(*variants.MODULES) as served:
                for counts in ([1], [k + 1], [2, 1, k + 1], [k + 1] * 16):
                    for first_row in (0,) if v1 else (0, 1, 3, 8):
                        for padded, variant, more in itertools.product((False, True), range(2), {False, large}):
                            if v1 and sum(counts) == len(counts):
                                continue  # without a draft the runner asks stock
                            form = variant if v1 else None
                            step(server, program, counts, first_row, padded, not v1 and variant == 1, form, more)
            now = ours(served)
            reached |= now
            left_out |= now - ours(warm)
    return len(reached), sorted(left_out)


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    found = [missed(v1, vocab, k, getattr(torch, dtype), *rest) for v1, vocab, k, dtype, *rest in jobs]
    print(json.dumps(found))
