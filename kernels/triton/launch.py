"""The entry to the fused path: :func:`arbitrate` verifies one step of a batch on the device.

It only launches kernels: nothing is read back, no tensor is indexed by a mask, and no launch depends on the contents of
a tensor. A machine without Triton has no Model Runner V2 either; there :mod:`vllm_cospec.kernels.cpu` does this work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import triton
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as stock

from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.reach import ends_of
from vllm_cospec.kernels.scores import NUM_BINS
from vllm_cospec.kernels.statistics import NUM_STATISTICS
from vllm_cospec.kernels.triton import joint, layout, mismatch, scan, target, verdict
from vllm_cospec.kernels.triton.policies import Program
from vllm_cospec.kernels.triton.step import Kept, Memory, Rows, Sampling, Slots, Trace, Verdict, Verified
from vllm_cospec.kernels.triton.workspace import BLOCK_SIZE, RESAMPLE_BLOCK_SIZE, Workspace


@dataclass(frozen=True)
class Tuning:
    """How the work of a program is laid out; no result but the last bits of a sum depends on it."""

    tile_size: int  # logits at a time in the first pass: of bfloat16, 16 bytes for each thread
    programs: int  # that a GPU runs side by side, about
    mismatch: dict[int, dict[str, int]]  # by the bytes of a logit
    scan: dict[str, int]


# A program of the mismatch pass holds two blocks in registers; with 128 of them two programs fit on a multiprocessor,
# which is faster than one with as many as ptxas would take (by a fifth on an H100). A pointer or two of the scan would
# be spilled to fit more there. AMD's compiler does not know the option, nor need it.
NVIDIA = Tuning(
    1024, 512, {2: {"num_warps": 8, "maxnreg": 128}, 4: {"num_warps": 16, "maxnreg": 128}}, {"maxnreg": 255}
)
AMD = Tuning(2048, 512, {2: {"num_warps": 4}, 4: {"num_warps": 4}}, {})
NO_DRAFT_LOGITS = None, 0, 0, 0
LARGE = 2**31  # bytes: from there on Triton compiles differently for AMD
tuning = AMD if torch.version.hip is not None else NVIDIA


def arbitrate(rows: Rows, sampling: Sampling, slots: Slots, program: Program, memory: Memory) -> Verified:
    """Verify one step of a batch.

    Args:
        rows: the step.
        sampling: how tokens are drawn.
        slots: per-request settings and state.
        program: the policy.
        memory: counters and scratch.
    """
    stages = _Stages(rows, slots, program, memory)
    stages.statistics(sampling.temperature, weighs_draft=True)
    stages.verdicts(sampling)
    stages.close()
    stages.mismatches()
    stages.scan(sampling.temperature, sampling.seed)
    stages.resample(sampling)
    return Verified(stages.sampled, stages.num_sampled, stages.trace)


def arbitrate_given(rows: Rows, given: Verdict, slots: Slots, program: Program, memory: Memory) -> Kept:
    """Verify one step whose strict verdict was reached elsewhere (Model Runner V1); nothing is drawn.

    Args:
        rows: the step; its processed logits are the raw ones, what is legal is the verdict's.
        given: the verdict.
        slots, program, memory: as for :func:`arbitrate`.

    Raises:
        ValueError: the rows have processed logits of their own.
    """
    if rows.separate:
        raise ValueError("a given verdict says itself what is legal: pass the raw logits alone")
    stages = _Stages(rows, slots, program, memory)
    stages.statistics(None, weighs_draft=False)  # the verdict has
    stages.given_verdicts(given)
    stages.close()
    stages.mismatches()
    stages.scan(None, given.seed)
    return Kept(stages.sampled, stages.num_sampled, stages.trace)


class _Stages:
    """The launches of one step."""

    def __init__(self, rows: Rows, slots: Slots, program: Program, memory: Memory) -> None:
        self._rows, self._slots, self._program, self._memory = rows, slots, program, memory
        self._num_rows, self._num_requests = rows.raw.shape[0], rows.first.shape[0] - 1
        self._space = memory.workspace
        self._space.reserve(self._num_rows, self._num_requests, program.numbers.top_k)
        self._vocab_size = rows.vocab_size
        self._num_blocks = triton.cdiv(self._vocab_size, BLOCK_SIZE)
        self._padded_blocks = triton.next_power_of_2(self._num_blocks)
        self._padded_steps = triton.next_power_of_2(rows.num_steps + 1)
        self._extra = {"KIND": program.extra, "K": max(program.numbers.top_k, 1)}
        self._raw, self._draft = readable(rows.raw, self._vocab_size), readable(rows.draft, self._vocab_size)
        self._own_draft = self._draft if program.reads_draft else NO_DRAFT_LOGITS
        self.sampled = rows.raw.new_empty((self._num_requests, rows.num_steps + 1), dtype=torch.int64)
        self.num_sampled = rows.raw.new_empty((self._num_requests,), dtype=torch.int32)
        self.trace: Trace | None = None
        if program.collect:
            self.trace = Trace(
                rows.raw.new_empty((self._num_rows, NUM_STATISTICS), dtype=torch.float32),
                torch.full((self._num_rows,), -1, dtype=torch.int32, device=rows.raw.device),
                rows.raw.new_empty((self._num_rows,), dtype=torch.float32),
            )

    def statistics(self, temperature: Tensor | None, weighs_draft: bool) -> None:
        """Read every target row; for strict verification of sampled rows the draft's as well."""
        rows, draft = self._rows, self._draft if weighs_draft else NO_DRAFT_LOGITS
        processed = readable(rows.processed, self._vocab_size) if rows.separate else self._raw
        target.target_statistics_kernel[(self._num_rows, self._num_blocks)](
            self._space.blocks, *self._raw, *processed, *draft,
            rows.drafted, rows.slot, rows.step, temperature, self._slots.arbitrated,
            self._num_rows, self._vocab_size, self._num_blocks,
            BLOCK_SIZE=BLOCK_SIZE, TILE_SIZE=tuning.tile_size,
            **vectors(self._vocab_size, self._raw, processed, draft), **self._extra,
            HAS_DRAFT_LOGITS=draft[0] is not None, SEPARATE=rows.separate,
        )  # fmt: skip

    def verdicts(self, sampling: Sampling) -> None:
        """Combine the blocks of every row and decide it as strict verification does."""
        rows, slots = self._rows, self._slots
        verdict.verdict_kernel[(self._num_rows,)](
            self._space.rows, self._space.blocks,
            *_strided(rows.raw), *_strided(rows.processed), *_strided(rows.draft),
            rows.drafted, rows.slot, rows.step, rows.position, sampling.temperature, sampling.seed,
            slots.arbitrated, slots.exact_tokens, slots.response_start, slots.ends,
            self._num_rows, self._vocab_size, self._num_blocks,
            PADDED_BLOCKS=self._padded_blocks, PADDED_STEPS=self._padded_steps, **self._extra,
            HAS_DRAFT_LOGITS=rows.draft is not None, SEPARATE=rows.separate,
            num_warps=1,
        )  # fmt: skip

    def given_verdicts(self, given: Verdict) -> None:
        """Combine the blocks of every row and take the verdict that is given."""
        rows, slots = self._rows, self._slots
        verdict.given_verdict_kernel[(given.draft_tokens.shape[0],)](
            self._space.rows, self._space.blocks, *_strided(rows.raw),
            rows.drafted, rows.step, rows.request_slot, rows.position,
            given.draft_tokens, given.request, given.accepted, given.tokens, given.legal, given.ratio, given.uniform,
            slots.arbitrated, slots.exact_tokens, slots.response_start, slots.ends,
            self._vocab_size, self._num_blocks,
            PADDED_BLOCKS=self._padded_blocks, PADDED_STEPS=self._padded_steps, **self._extra,
            num_warps=1,
        )  # fmt: skip

    def close(self) -> None:
        """Close rows to the policy, where a request has a scope."""
        closed, fields = self._rows.closed, layout.ROW_FIELDS.value
        if closed is not None:
            status = self._space.rows[: self._num_rows * fields].view(self._num_rows, fields)[:, layout.STATUS.value]
            status.masked_fill_(closed & (status == layout.OPEN.value), layout.CLOSED.value)

    def mismatches(self) -> None:
        """Read the rejected rows the policy may come to, where it reads more than the first pass knows."""
        if not self._program.rereads:
            return
        rows, slots = self._rows, self._slots
        raw, draft = self._raw, self._own_draft
        common = (
            self._space.partials, self._space.rows, *raw, *draft,
            rows.drafted, rows.first, rows.request_slot,
            slots.max_overrides, slots.overrides_so_far, slots.max_regret, slots.regret_so_far,
            self._vocab_size, self._num_blocks,
        )  # fmt: skip
        work = {"BLOCK_SIZE": BLOCK_SIZE, "PADDED_STEPS": self._padded_steps, **vectors(self._vocab_size, raw, draft)}
        grid, numbers = (self._num_requests, self._num_blocks, self._shares()), self._program.numbers
        mismatch.mismatch_kernel[grid](*common, **work, **tuning.mismatch[rows.raw.element_size()])
        if numbers.joint:
            joint.joint_kernel[grid](
                *common,
                float(numbers.first),
                KIND=numbers.joint,
                TILE_SIZE=tuning.tile_size,
                PADDED_BLOCKS=self._padded_blocks,
                **work,
            )

    def _shares(self) -> int:
        """Return among how many programs the mismatches of a request's block are shared: several in a small batch."""
        return max(1, min(self._rows.num_steps, tuning.programs // (self._num_requests * self._num_blocks)))

    def scan(self, temperature: Tensor | None, seed: Tensor) -> None:
        """Walk every block."""
        rows, slots, program, trace, space = self._rows, self._slots, self._program, self.trace, self._space
        numbers, (hidden_1, hidden_2) = program.numbers, program.hidden
        scores = (None, 0, 0) if slots.scores is None else (slots.scores, *slots.scores.stride())
        scan.scan_kernel[(self._num_requests,)](
            self.sampled, self.sampled.stride(0), self.num_sampled, space.target_lse, space.draft_lse,
            self._memory.counters,
            *((trace.statistics, trace.action, trace.probability) if trace else (None, None, None)),
            space.rows, space.blocks, space.partials if program.rereads else None,
            *self._own_draft[:3],
            rows.drafted, rows.first, rows.request_slot, rows.position, temperature, seed,
            slots.arbitrated, slots.threshold, slots.max_overrides, slots.overrides_so_far, slots.max_regret,
            slots.regret_so_far, slots.stops, slots.response_start,
            *scores, space.score_edges if slots.scores is not None else None,
            slots.forced if program.collect else None,
            program.weights, self._num_blocks, rows.num_steps,
            float(numbers.first), float(numbers.second), numbers.seed, numbers.window,
            BLOCK_SIZE=BLOCK_SIZE, PADDED_BLOCKS=self._padded_blocks, PADDED_STEPS=self._padded_steps,
            POLICY=program.code, JOINT=numbers.joint, **self._extra, COLLECT=program.collect,
            SAMPLE_ACTIONS=program.sample_actions, HIDDEN_1=hidden_1, HIDDEN_2=hidden_2,
            PADDED_1=triton.next_power_of_2(hidden_1), PADDED_2=triton.next_power_of_2(max(hidden_2, 16)),
            **tuning.scan,
        )  # fmt: skip

    def resample(self, sampling: Sampling) -> None:
        """Draw the bonus token, or the replacement of a sampled request's rejected draft, with vLLM's own kernels."""
        rows, space = self._rows, self._space
        num_blocks = triton.cdiv(self._vocab_size, RESAMPLE_BLOCK_SIZE)
        draws = (space.draw_tokens, num_blocks, space.draw_values, num_blocks)
        stock._resample_kernel[(self._num_requests, num_blocks)](
            *draws, *_strided(rows.processed), space.target_lse, *_strided(rows.draft), space.draft_lse,
            self.num_sampled, rows.first, rows.slot, rows.drafted, sampling.temperature, sampling.seed, rows.position,
            None,  # block verification
            None, 0, None, None, 0, 0,  # watermarking
            self._vocab_size,
            BLOCK_SIZE=RESAMPLE_BLOCK_SIZE, HAS_DRAFT_LOGITS=rows.draft is not None, USE_FP64=sampling.use_fp64,
            USE_BLOCK_VERIFICATION=False, CONTEXT_WIDTH=1, WATERMARK=False, DEDUPLICATE_CONTEXTS=False,
        )  # fmt: skip
        stock._insert_resampled_kernel[(self._num_requests,)](
            self.sampled, self.sampled.stride(0), self.num_sampled, *draws, num_blocks,
            rows.first, rows.slot, sampling.temperature,
            PADDED_RESAMPLE_NUM_BLOCKS=triton.next_power_of_2(num_blocks),
        )  # fmt: skip


def _strided(logits: Tensor | None) -> tuple[Any, ...]:
    """Return rows of logits as the kernels take them, with their strides; draft logits have two."""
    return (None, 0, 0) if logits is None else (logits, *logits.stride()[:-1])


def readable(logits: Tensor | None, vocab_size: int) -> tuple[Any, ...]:
    """Return rows of logits with their strides and how many elements of a row may be read, at least ``vocab_size``.

    Without draft logits, ``NO_DRAFT_LOGITS``.

    The vocabulary is rounded up to a multiple of 16 where every row goes on for that long, the last one too: vLLM
    pads rows to multiples of 64 and hands over the part that is the vocabulary.
    """
    if logits is None:
        return NO_DRAFT_LOGITS
    *strides, _ = logits.stride()
    width = triton.cdiv(vocab_size, 16) * 16
    if width > vocab_size:
        last = logits.storage_offset() + sum(s * (n - 1) for s, n in zip(strides, logits.shape[:-1], strict=True))
        room = logits.untyped_storage().nbytes() // logits.element_size() - last
        if min(*strides, room) < width:
            width = vocab_size
    return (logits, *strides, width)


def vectors(vocab_size: int, *logits: tuple[Any, ...]) -> dict[str, Any]:
    """Return what the loads of these rows may count on: strides and widths in multiples of 8, or of nothing."""
    given = [numbers for tensor, *numbers in logits if tensor is not None]
    unit = 8 if all(number % 8 == 0 for numbers in given for number in numbers) else 1
    return {"UNIT": unit, "PADDED": any(numbers[-1] > vocab_size for numbers in given)}


@dataclass(frozen=True)
class ServerShapes:
    """What a server's settings decide about the shapes and types of its steps."""

    vocab_size: int
    dtype: torch.dtype  # of the target's logits
    draft_logits: Tensor | None  # [S, K, V], only read
    num_steps: int  # K
    device: torch.device
    use_fp64: bool = False
    given_verdict: bool = False  # Model Runner V1
    counts_scores: bool = False
    large_logits: bool = False  # those of a step can be beyond what AMD's compiler addresses with 32 bits

    @property
    def num_slots(self) -> int:
        """As many slots as the draft logits have."""
        return 1 if self.draft_logits is None else self.draft_logits.shape[0]

    def constant(self, size: int, value: float, of: torch.dtype = torch.int32) -> Tensor:
        """Return a vector of one value."""
        return torch.full((size,), value, dtype=of, device=self.device)

    def chunks(self) -> Iterator[Tensor]:
        """Yield the logits of one request, [K + 1, V], in every form a model can hand them over.

        vLLM's models pad rows to multiples of 64 and cut off the rest; a model may also leave its rows as they are,
        and then the first row of a chunk need not be aligned. AMD's compiler makes another program of logits that are
        part of more than 2 GiB.
        """
        rows, padded = self.num_steps + 1, triton.cdiv(self.vocab_size, 64) * 64
        for least in (0, LARGE) if self.large_logits else (0,):

            def logits(count: int, width: int, least: int = least) -> Tensor:
                beyond = triton.cdiv(least, width * self.dtype.itemsize)
                return torch.empty(count + beyond, width, dtype=self.dtype, device=self.device)[:count].zero_()

            yield logits(rows, padded)[:, : self.vocab_size]
            if padded > self.vocab_size:
                yield logits(rows, self.vocab_size)
                if not self.given_verdict and self.vocab_size * self.dtype.itemsize % 16:  # V1 verifies no chunks
                    yield logits(rows + 1, self.vocab_size)[1:]

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
            ends=torch.tensor([ends_of(UNLIMITED, [])] * size, dtype=torch.int32, device=self.device),
            stops=self.constant(size, 0),
            scores=torch.zeros(size, NUM_BINS, dtype=torch.int32, device=self.device) if self.counts_scores else None,
        )

    def verdicts(self) -> list[Verdict]:
        """Return a verdict of every form: of a greedy batch, of a sampled one."""
        k, yes = self.num_steps, torch.ones(self.num_steps, dtype=torch.bool, device=self.device)
        place, drawn = self.constant(k, 0, torch.int64), self.constant(k, 1, torch.float32)
        common = (self.constant(k, 1), place, yes, place, yes, self.constant(self.num_slots, 0, torch.int64))
        return [Verdict(*common), Verdict(*common, drawn, drawn)]


def warm_up(server: ServerShapes, program: Program) -> None:
    """Compile every variant a server can launch, on a batch of one request.

    The variants differ in whether the processed logits are the raw ones, or, with a given verdict, in what was drawn;
    and in how the rows lie in memory. Whether rows are greedy is decided at run time.
    """
    slots, counters = server.slots(), server.constant(server.num_steps + 1, 0, torch.int64)
    space = Workspace(
        server.device, server.vocab_size, server.num_steps + 1, 1, program.numbers.top_k, server.use_fp64
    )  # fmt: skip
    memory = Memory(counters, space)
    sampling = Sampling(
        server.constant(server.num_slots, 1, torch.float32), server.constant(server.num_slots, 0, torch.int64),
        server.use_fp64,
    )  # fmt: skip
    for raw in server.chunks():
        if server.given_verdict:
            for given in server.verdicts():
                arbitrate_given(server.rows(raw, raw), given, slots, program, memory)
            continue
        for processed in (raw, torch.empty_like(raw, dtype=torch.float32).copy_(raw)):  # as vLLM's sampler copies
            arbitrate(server.rows(raw, processed), sampling, slots, program, memory)
    if server.large_logits and server.device.type != "cpu":
        torch.accelerator.empty_cache()


def exceeds_32_bits(num_rows: int, vocab_size: int, dtype: torch.dtype) -> bool:
    """Return whether so many rows of logits make another program here than few do, see :meth:`ServerShapes.chunks`."""
    padded = triton.cdiv(vocab_size, 64) * 64
    return torch.version.hip is not None and num_rows * padded * dtype.itemsize >= LARGE
