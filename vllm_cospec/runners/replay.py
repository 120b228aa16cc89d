"""Branches of sampled responses: their first block is drafted and verified with the random numbers it had before.

For training, on the CPU. Drafts of a seeded request are a function of its seed and their place (:mod:`seeds`). What
verifies them comes from the request's generator, whose state is noted at every step and set again for the branch. The
token a branch draws first stands before the block and was drawn as well, so it is put in place of what is drawn now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_cospec import compat
from vllm_cospec.hooks import RUNNER
from vllm_cospec.requests import Branch
from vllm_cospec.runners.seeds import hashed


class Replay:
    """Wraps the sampling of a V1 runner that collects."""

    def __init__(self, runner: Any, branch_of: Callable[[Any], Branch | None]):
        """Args:
        runner: vLLM's GPUModelRunner or a subclass.
        branch_of: finds the branch a cached request is, if it is one.
        """
        self._runner = runner
        self._branch_of = branch_of
        self._sample = compat.wrap(f"{RUNNER}._sample", runner, self.sample)
        self._states: dict[int, bytes] = {}

    def state_of(self, row: int) -> bytes | None:
        """Return the state a request's generator had when this step began; None where nothing is drawn from one."""
        return self._states.get(row)

    def sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        """As the runner's: samples or verifies one step."""
        batch = self._runner.input_batch
        branches = self._branches()
        for row, (branch, emitted) in branches.items():
            if row in batch.generators:
                _prepare(batch.generators[row], branch, emitted)
        self._states = {row: own.get_state().numpy().tobytes() for row, own in batch.generators.items()}
        output = self._sample(logits, spec_decode_metadata)
        thrown_away = self._runner.discard_request_mask.np
        for row, (branch, emitted) in branches.items():
            if not emitted and branch.first_token is not None and not thrown_away[row]:
                output.sampled_token_ids[row, 0] = min(branch.first_token, batch.vocab_size - 1)
        return output

    def _branches(self) -> dict[int, tuple[Branch, int]]:
        """Return the branches of the batch by row, and how many tokens each has emitted."""
        found = {}
        for row, request_id in enumerate(self._runner.input_batch.req_ids):
            cached = self._runner.requests[request_id]
            branch = self._branch_of(cached)
            if branch is not None:
                found[row] = branch, len(cached.output_token_ids)
        return found


def _prepare(generator: torch.Generator, branch: Branch, emitted: int) -> None:
    """Set a branch's generator to what it was before the first block, and begin anew behind it where that is asked."""
    if emitted == 1 and branch.generator is not None:
        generator.set_state(torch.frombuffer(bytearray(branch.generator), dtype=torch.uint8))
    elif emitted > 1 and branch.reseed is not None:
        generator.manual_seed(hashed("continuation", branch.reseed, branch.written + emitted) >> 1)
