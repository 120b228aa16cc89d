"""The entry to the fused path: :func:`arbitrate` verifies one step of a batch on the device.

It only launches kernels: nothing is read back, no tensor is indexed by a mask, and no launch depends on the contents of
a tensor. A machine without Triton has no Model Runner V2 either; there :mod:`vllm_cospec.kernels.cpu` does this work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import triton
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as stock

from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.statistics import NUM_STATISTICS
from vllm_cospec.kernels.triton import draft, layout, scan, target, verdict
from vllm_cospec.kernels.triton.policies import Program
from vllm_cospec.kernels.triton.step import Kept, Rows, Sampling, Slots, Trace, Verdict, Verified

# As stock: the strict verdict is bit-identical only when sums are taken over the same blocks.
BLOCK_SIZE, RESAMPLE_BLOCK_SIZE = 8192, 1024
# Small enough that four warps hold what they need of a tile in registers: see the offline report.
TILE_SIZE = 2048
# Left alone, ptxas spills a pointer or two of the scan to fit more programs on a multiprocessor. There is one program
# per request: let it have its registers. AMD's compiler does not know the option, nor need it.
SCAN_OPTIONS = {} if torch.version.hip else {"maxnreg": 255}


def arbitrate(rows: Rows, sampling: Sampling, slots: Slots, program: Program, counters: Tensor) -> Verified:
    """Verify one step of a batch.

    Args:
        rows: the step.
        sampling: how tokens are drawn.
        slots: per-request settings and state.
        program: the policy.
        counters: [K + 1] int64, added to: overrides per position, then mismatches.
    """
    stages = _Stages(rows, slots, program, counters)
    stages.statistics(sampling.temperature, rows.draft)
    stages.verdicts(sampling, rows.draft)
    stages.leave_out()
    stages.draft_statistics()
    target_lse, draft_lse = stages.scan(sampling.temperature, sampling.seed)
    _resample(rows, sampling, stages.sampled, stages.num_sampled, target_lse, draft_lse)
    return Verified(stages.sampled, stages.num_sampled, stages.trace)


def arbitrate_given(rows: Rows, given: Verdict, slots: Slots, program: Program, counters: Tensor) -> Kept:
    """Verify one step whose strict verdict was reached elsewhere (Model Runner V1); nothing is drawn.

    Args:
        rows: the step; its processed logits are the raw ones, what is legal is the verdict's.
        given: the verdict.
        slots, program, counters: as for :func:`arbitrate`.

    Raises:
        ValueError: the rows have processed logits of their own.
    """
    if rows.separate:
        raise ValueError("a given verdict says itself what is legal: pass the raw logits alone")
    stages = _Stages(rows, slots, program, counters)
    stages.statistics(None, None)  # the verdict has weighed the draft already
    stages.verdicts(None, None)
    stages.given_verdicts(given)
    stages.leave_out()
    stages.draft_statistics()
    stages.scan(None, given.seed)
    return Kept(stages.sampled, stages.num_sampled, stages.trace)


class _Stages:
    """The launches of one step and the buffers between them."""

    def __init__(self, rows: Rows, slots: Slots, program: Program, counters: Tensor):
        self._rows, self._slots, self._program, self._counters = rows, slots, program, counters
        self._num_rows, self._num_requests = rows.raw.shape[0], rows.first.shape[0] - 1
        self._vocab_size = rows.vocab_size
        self._num_blocks = triton.cdiv(self._vocab_size, BLOCK_SIZE)
        self._num_tiles = triton.cdiv(self._vocab_size, TILE_SIZE)
        self._padded_steps = triton.next_power_of_2(rows.num_steps + 1)
        self._top_k = max(2, program.numbers.top_k)  # the gap needs two
        self._needs_draft = rows.draft is not None and program.needs_draft
        greedy = (self._num_rows, self._num_tiles) if rows.separate else (0, 0)
        self._partials = (
            *(self._floats(self._num_rows, self._num_blocks) for _ in range(4)),
            self._floats(*greedy), self._integers(*greedy),
            self._floats(self._num_rows, self._top_k + layout.TILE_SUMS.value, self._num_tiles),
            self._integers(self._num_rows, layout.TILE_INTS.value, self._num_tiles),
        )  # fmt: skip
        self._row_ints = self._integers(self._num_rows, layout.ROW_INTS.value)
        self._row_floats = self._floats(self._num_rows, layout.ROW_FLOATS.value)
        self._draft_partials: Tensor | None = None
        self.sampled = self._integers(self._num_requests, rows.num_steps + 1, dtype=torch.int64)
        self.num_sampled = self._integers(self._num_requests)
        self.trace: Trace | None = None
        if program.collect:
            action = torch.full((self._num_rows,), -1, dtype=torch.int32, device=rows.raw.device)
            self.trace = Trace(self._floats(self._num_rows, NUM_STATISTICS), action, self._floats(self._num_rows))

    def _floats(self, *shape: int) -> Tensor:
        return self._rows.raw.new_empty(shape, dtype=torch.float32)

    def _integers(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return self._rows.raw.new_empty(shape, dtype=dtype)

    def statistics(self, temperature: Tensor | None, strict_draft: Tensor | None) -> None:
        """Read every target row; for strict verification of sampled rows the draft's as well."""
        rows = self._rows
        target.target_statistics_kernel[(self._num_rows, self._num_blocks)](
            *self._partials, *_strided(rows.raw), *_strided(rows.processed), *_strided(strict_draft),
            rows.drafted, rows.slot, rows.step, temperature, self._slots.arbitrated,
            self._num_rows, self._vocab_size, self._num_blocks, self._num_tiles,
            BLOCK_SIZE=BLOCK_SIZE, TILE_SIZE=TILE_SIZE, TOP_K=self._top_k,
            HAS_DRAFT_LOGITS=strict_draft is not None, SEPARATE=rows.separate,
        )  # fmt: skip

    def verdicts(self, sampling: Sampling | None, strict_draft: Tensor | None) -> None:
        """Combine the tiles of every row and decide it as strict verification does."""
        rows, slots = self._rows, self._slots
        temperature, seed = (sampling.temperature, sampling.seed) if sampling is not None else (None, None)
        verdict.row_kernel[(self._num_rows,)](
            self._row_ints, self._row_floats, *self._partials,
            *_strided(rows.raw), *_strided(rows.processed), *_strided(strict_draft),
            rows.drafted, rows.slot, rows.step, rows.position, temperature, seed,
            slots.arbitrated, slots.exact_tokens, slots.response_start,
            self._num_rows, self._vocab_size, self._num_blocks, self._num_tiles,
            PADDED_BLOCKS=triton.next_power_of_2(self._num_blocks),
            PADDED_TILES=triton.next_power_of_2(self._num_tiles),
            TOP_K=self._top_k, PADDED_TOP_K=triton.next_power_of_2(self._top_k),
            ENTROPY_K=self._program.numbers.top_k,
            HAS_DRAFT_LOGITS=strict_draft is not None, SEPARATE=rows.separate,
            num_warps=1,
        )  # fmt: skip

    def given_verdicts(self, given: Verdict) -> None:
        """Put a given verdict over the one that :meth:`verdicts` has reached."""
        verdict.given_verdict_kernel[(given.draft_tokens.shape[0],)](
            self._row_ints, self._row_floats, given.draft_tokens, given.request, given.accepted, given.tokens,
            given.legal, given.ratio, given.uniform,
            num_warps=1,
        )  # fmt: skip

    def leave_out(self) -> None:
        """Close rows to the policy; drafts that cannot be delivered are, besides, as if none had been proposed."""
        rows, status = self._rows, self._row_ints[:, layout.STATUS.value]
        if rows.closed is not None:
            status.masked_fill_(rows.closed & (status == layout.OPEN.value), layout.CLOSED.value)
        if rows.undeliverable is not None:
            status.masked_fill_(rows.undeliverable, layout.NO_DRAFT.value)

    def draft_statistics(self) -> None:
        """Read target and draft row of each request's first mismatch, where the policy looks at the draft."""
        if not self._needs_draft:
            return
        rows, slots = self._rows, self._slots
        self._draft_partials = self._floats(self._num_requests, layout.DRAFT_FIELDS.value, self._num_tiles)
        draft.draft_statistics_kernel[(self._num_requests, self._num_tiles)](
            self._draft_partials, self._row_ints, self._row_floats, *_strided(rows.raw), *_strided(rows.draft),
            rows.first, rows.request_slot, slots.max_overrides, slots.overrides_so_far,
            self._vocab_size, self._num_tiles,
            TILE_SIZE=TILE_SIZE, PADDED_STEPS=self._padded_steps,
        )  # fmt: skip

    def scan(self, temperature: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
        """Walk every block; returns the log-sums of exponentials of target and draft at the rejected rows, [B]."""
        rows, slots, program, trace = self._rows, self._slots, self._program, self.trace
        target_lse, draft_lse = self._floats(self._num_requests), self._floats(self._num_requests)
        numbers, (hidden_1, hidden_2) = program.numbers, program.hidden
        logits = (*_strided(rows.raw), *_strided(rows.draft)) if self._needs_draft else (None, 0, None, 0, 0)
        scan.scan_kernel[(self._num_requests,)](
            self.sampled, self.sampled.stride(0), self.num_sampled, target_lse, draft_lse, self._counters,
            *((trace.statistics, trace.action, trace.probability) if trace else (None, None, None)),
            self._draft_partials, self._row_ints, self._row_floats, *logits,
            rows.drafted, rows.first, rows.request_slot, rows.position, temperature, seed,
            slots.arbitrated, slots.threshold, slots.max_overrides, slots.overrides_so_far, slots.max_regret,
            slots.regret_so_far, slots.response_start, slots.forced if program.collect else None,
            program.weights, self._vocab_size, self._num_tiles, rows.num_steps,
            float(numbers.first), float(numbers.second), numbers.seed, numbers.window,
            TILE_SIZE=TILE_SIZE, PADDED_TILES=triton.next_power_of_2(self._num_tiles),
            PADDED_STEPS=self._padded_steps,
            POLICY=program.code, NEEDS_DRAFT=self._needs_draft, COLLECT=program.collect,
            SAMPLE_ACTIONS=program.sample_actions, HIDDEN_1=hidden_1, HIDDEN_2=hidden_2,
            PADDED_1=triton.next_power_of_2(hidden_1), PADDED_2=triton.next_power_of_2(max(hidden_2, 16)),
            **SCAN_OPTIONS,
        )  # fmt: skip
        return target_lse, draft_lse


def _strided(logits: Tensor | None) -> tuple[Any, ...]:
    """Return rows of logits as the kernels take them, with their strides; draft logits have two."""
    return (None, 0, 0) if logits is None else (logits, *logits.stride()[:-1])


def _resample(
    rows: Rows, sampling: Sampling, sampled: Tensor, num_sampled: Tensor, target_lse: Tensor, draft_lse: Tensor
) -> None:
    """Draw the bonus token, or the replacement of a sampled request's rejected draft, with vLLM's own kernels."""
    num_requests = num_sampled.shape[0]
    num_blocks = triton.cdiv(rows.vocab_size, RESAMPLE_BLOCK_SIZE)
    argmax = sampled.new_empty(num_requests, num_blocks)
    value = target_lse.new_empty(
        num_requests, num_blocks, dtype=torch.float64 if sampling.use_fp64 else torch.float32
    )  # fmt: skip
    stock._resample_kernel[(num_requests, num_blocks)](
        argmax, argmax.stride(0), value, value.stride(0), *_strided(rows.processed), target_lse,
        *_strided(rows.draft), draft_lse, num_sampled, rows.first, rows.slot, rows.drafted, sampling.temperature,
        sampling.seed, rows.position,
        None,  # block verification
        None, 0, None, None, 0, 0,  # watermarking
        rows.vocab_size,
        BLOCK_SIZE=RESAMPLE_BLOCK_SIZE, HAS_DRAFT_LOGITS=rows.draft is not None, USE_FP64=sampling.use_fp64,
        USE_BLOCK_VERIFICATION=False, CONTEXT_WIDTH=1, WATERMARK=False, DEDUPLICATE_CONTEXTS=False,
    )  # fmt: skip
    stock._insert_resampled_kernel[(num_requests,)](
        sampled, sampled.stride(0), num_sampled, argmax, argmax.stride(0), value, value.stride(0), num_blocks,
        rows.first, rows.slot, sampling.temperature,
        PADDED_RESAMPLE_NUM_BLOCKS=triton.next_power_of_2(num_blocks),
    )  # fmt: skip


@dataclass(frozen=True)
class Server:
    """What a server's settings decide about the shapes and types of its steps."""

    vocab_size: int
    dtype: torch.dtype  # of the target's logits
    draft_logits: Tensor | None  # [S, K, V], only read
    num_steps: int  # K
    device: torch.device
    use_fp64: bool = False
    given_verdict: bool = False  # Model Runner V1

    @property
    def num_slots(self) -> int:
        """As many slots as the draft logits have."""
        return 1 if self.draft_logits is None else self.draft_logits.shape[0]

    def constant(self, size: int, value: float, of: torch.dtype = torch.int32) -> Tensor:
        """Return a vector of one value."""
        return torch.full((size,), value, dtype=of, device=self.device)

    def chunks(self) -> list[Tensor]:
        """Return the logits of one request, [K + 1, V], in every alignment a chunk of rows can have."""
        rows = self.num_steps + 1
        logits = torch.zeros(rows, self.vocab_size, dtype=self.dtype, device=self.device)
        if self.given_verdict or self.vocab_size * logits.element_size() % 16 == 0:
            return [logits]  # Model Runner V1 verifies no chunks
        return [logits, torch.zeros(rows + 1, self.vocab_size, dtype=self.dtype, device=self.device)[1:]]

    def rows(self, raw: Tensor, processed: Tensor) -> Rows:
        """Return a step of one request."""
        count, integer = self.num_steps + 1, torch.int32
        return Rows(
            raw, processed, self.draft_logits,
            drafted=self.constant(count, 1),
            first=torch.arange(0, count + 1, count, dtype=integer, device=self.device),
            position=torch.arange(count, dtype=torch.int64, device=self.device),
            request_slot=self.constant(1, 0, torch.int64),
            slot=self.constant(count, 0, torch.int64),
            step=torch.arange(count, dtype=integer, device=self.device),
            num_steps=self.num_steps,
        )  # fmt: skip

    def slots(self) -> Slots:
        """Return slots whose requests are arbitrated without limits."""
        size = self.num_slots
        return Slots(
            arbitrated=self.constant(size, 1),
            threshold=self.constant(size, 0.5, torch.float32),
            max_overrides=self.constant(size, UNLIMITED),
            exact_tokens=self.constant(size, 0),
            overrides_so_far=self.constant(size, 0),
            max_regret=self.constant(size, math.inf, torch.float32),
            regret_so_far=self.constant(size, 0, torch.float32),
            response_start=self.constant(size, 1),
            forced=self.constant(size, -1),
        )

    def verdicts(self) -> list[Verdict]:
        """Return a verdict of every form: of a greedy batch, of a sampled one."""
        k, yes = self.num_steps, torch.ones(self.num_steps, dtype=torch.bool, device=self.device)
        place, drawn = self.constant(k, 0, torch.int64), self.constant(k, 1, torch.float32)
        common = (self.constant(k, 1), place, yes, place, yes, self.constant(self.num_slots, 0, torch.int64))
        return [Verdict(*common), Verdict(*common, drawn, drawn)]


def warm_up(server: Server, program: Program) -> None:
    """Compile every variant a server can launch, on a batch of one request.

    The variants differ in whether the processed logits are the raw ones, or, with a given verdict, in what was drawn;
    and, where rows are not a multiple of 16 bytes long, in whether the first row of a chunk happens to be aligned.
    Whether rows are greedy is decided at run time.
    """
    slots, counters = server.slots(), server.constant(server.num_steps + 1, 0, torch.int64)
    sampling = Sampling(
        server.constant(server.num_slots, 1, torch.float32), server.constant(server.num_slots, 0, torch.int64),
        server.use_fp64,
    )  # fmt: skip
    for raw in server.chunks():
        if server.given_verdict:
            for given in server.verdicts():
                arbitrate_given(server.rows(raw, raw), given, slots, program, counters)
            continue
        for processed in (raw, raw.to(torch.float32, copy=True)):
            arbitrate(server.rows(raw, processed), sampling, slots, program, counters)
