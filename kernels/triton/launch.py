"""The entry to the fused path: :func:`arbitrate` verifies one step of a batch on the device.

It only launches kernels: nothing is read back, no tensor is indexed by a mask, and no launch depends on the contents of
a tensor. A machine without Triton has no Model Runner V2 either; there :mod:`vllm_cospec.kernels.cpu` does this work.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import triton
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as stock

from vllm_cospec.kernels.statistics import NUM_STATISTICS
from vllm_cospec.kernels.triton import scan, target
from vllm_cospec.kernels.triton.policies import Program
from vllm_cospec.kernels.triton.verdict import Verdict

# As stock: the strict verdict is bit-identical only when sums are taken over the same blocks.
BLOCK_SIZE, RESAMPLE_BLOCK_SIZE = 8192, 1024
# Small enough that four warps hold what they need of a tile in registers: see the offline report.
TILE_SIZE = 2048
# Left alone, ptxas spills a pointer or two of the scan to fit more programs on a multiprocessor. There is one program
# per request: let it have its registers. AMD's compiler does not know the option, nor need it.
SCAN_OPTIONS = {} if torch.version.hip else {"maxnreg": 255}
UNLIMITED = 2**31 - 1
"""``max_overrides`` of a request without a limit."""


@dataclass
class Slots:
    """Settings and state of every request slot; tensors of S entries on the device."""

    arbitrated: Tensor  # int32, 0: strict
    threshold: Tensor  # float32, of the learned policy
    max_overrides: Tensor  # int32, UNLIMITED for none
    exact_tokens: Tensor  # int32
    overrides_so_far: Tensor  # int32, added to
    response_start: Tensor  # int32, tokens before the response
    forced: Tensor  # int32, 2 * (index in the response) + keep of a decision made beforehand, -1: none; for training


@dataclass
class Trace:
    """What the policy saw and did; R rows, one per row of logits."""

    statistics: Tensor  # [R, 16] float32, defined where action >= 0
    action: Tensor  # [R] int32: 1 kept, 0 not, -1 not consulted
    probability: Tensor  # [R] float32, of keeping, for the learned policy


@dataclass
class Verified:
    """What verification makes of a step."""

    sampled: Tensor  # [B, K + 1] int64, defined up to num_sampled
    num_sampled: Tensor  # [B] int32, at least 1; with a given verdict the drafts kept, see :func:`arbitrate`
    trace: Trace | None = None


def arbitrate(
    raw_logits: Tensor,
    processed_logits: Tensor,
    draft_logits: Tensor | None,
    draft_sampled: Tensor,
    cu_num_logits: Tensor,
    pos: Tensor,
    idx_mapping: Tensor,
    expanded_idx_mapping: Tensor,
    expanded_local_pos: Tensor,
    temperature: Tensor,
    seed: Tensor,
    num_speculative_steps: int,
    slots: Slots,
    program: Program,
    counters: Tensor,
    use_fp64: bool = False,
    collect: bool = False,
    sample_actions: bool = False,
    verdict: Verdict | None = None,
) -> Verified:
    """Verify one step of B requests with R rows of logits in all; rows of one request are consecutive.

    Args:
        raw_logits: [R, V] float32, bfloat16 or float16, after the grammar mask only; decides nothing but statistics.
        processed_logits: [R, V], what tokens are drawn from and what is legal; may be ``raw_logits`` itself.
        draft_logits: [S, K, V], before temperature; None for drafters without logits.
        draft_sampled: [R] int; the draft of row r is entry r + 1, negative for a placeholder, which is never kept.
        cu_num_logits: [B + 1] int, first row of each request; the last row of a request is its bonus row.
        pos: [R] int64, position of each row in its sequence.
        idx_mapping: [B] int, slot of each request.
        expanded_idx_mapping: [R] int, slot of each row.
        expanded_local_pos: [R] int, index of each row in its request.
        temperature: [S] float32, 0 for greedy requests.
        seed: [S] int64.
        num_speculative_steps: K.
        slots: per-request settings and state.
        program: the policy.
        counters: [K + 1] int64, added to: overrides per position, then mismatches.
        use_fp64: draw Gumbel noise in float64, as vLLM's option of that name.
        collect: return a trace.
        sample_actions: training: keep with the score as probability instead of comparing it with the threshold.
        verdict: what strict verification says, where it was reached elsewhere (Model Runner V1). Then the processed
            logits are the raw ones, every temperature is 0, and nothing is drawn: the result holds the drafts kept
            and, where one was not, the verdict's token; a request's last token after a complete block is the caller's.

    Raises:
        ValueError: shapes or strides the kernels do not take.
    """
    if raw_logits.shape != processed_logits.shape or raw_logits.stride(-1) != 1 or processed_logits.stride(-1) != 1:
        raise ValueError("raw and processed logits must have one shape and contiguous rows")
    if draft_logits is not None and (draft_logits.ndim != 3 or draft_logits.stride(-1) != 1):
        raise ValueError("draft logits must be [slots, K, V] with contiguous rows")
    num_requests = cu_num_logits.shape[0] - 1
    num_rows, vocab_size = raw_logits.shape
    has_draft = draft_logits is not None
    if draft_logits is not None:
        vocab_size = min(vocab_size, draft_logits.shape[-1])  # as stock: one of the two may be padded
    num_blocks = triton.cdiv(vocab_size, BLOCK_SIZE)
    num_tiles = triton.cdiv(vocab_size, TILE_SIZE)
    padded_steps = triton.next_power_of_2(num_speculative_steps + 1)
    separate = processed_logits is not raw_logits
    if separate and verdict is not None:
        raise ValueError("a given verdict brings its own processed logits")
    needs_draft = has_draft and program.needs_draft

    def floats(*shape: int) -> Tensor:
        return raw_logits.new_empty(shape, dtype=torch.float32)

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return raw_logits.new_empty(shape, dtype=dtype)

    greedy_shape = (num_rows, num_tiles) if separate else (0, 0)
    partials = (
        *(floats(num_rows, num_blocks) for _ in range(4)), floats(*greedy_shape), integers(*greedy_shape),
        floats(num_rows, program.top_k + 2, num_tiles), integers(num_rows, 3, num_tiles),
    )  # fmt: skip
    row_ints, row_floats = integers(num_rows, 6), floats(num_rows, 12)
    raw = (raw_logits, raw_logits.stride(0))
    processed = (processed_logits, processed_logits.stride(0))
    draft = (draft_logits, draft_logits.stride(0), draft_logits.stride(1)) if draft_logits is not None else (None, 0, 0)
    strict_draft = draft if verdict is None else (None, 0, 0)  # a given verdict has weighed the draft already
    has_strict_draft = strict_draft[0] is not None
    target.target_statistics_kernel[(num_rows, num_blocks)](
        *partials, *raw, *processed, *strict_draft,
        draft_sampled, expanded_idx_mapping, expanded_local_pos, temperature, slots.arbitrated,
        num_rows, vocab_size, num_blocks, num_tiles,
        BLOCK_SIZE=BLOCK_SIZE, TILE_SIZE=TILE_SIZE, TOP_K=program.top_k,
        HAS_DRAFT_LOGITS=has_strict_draft, SEPARATE=separate,
    )  # fmt: skip
    target.row_kernel[(num_rows,)](
        row_ints, row_floats, *partials, *raw, *processed, *strict_draft,
        draft_sampled, expanded_idx_mapping, expanded_local_pos, pos, temperature, seed,
        slots.arbitrated, slots.exact_tokens, slots.response_start, num_rows, vocab_size, num_blocks, num_tiles,
        PADDED_BLOCKS=triton.next_power_of_2(num_blocks), PADDED_TILES=triton.next_power_of_2(num_tiles),
        TOP_K=program.top_k, PADDED_TOP_K=triton.next_power_of_2(program.top_k), ENTROPY_K=program.entropy_k,
        HAS_DRAFT_LOGITS=has_strict_draft, SEPARATE=separate,
        num_warps=1,
    )  # fmt: skip
    if verdict is not None:
        verdict.write(row_ints, row_floats, cu_num_logits, idx_mapping, padded_steps)
    draft_partials = None
    if needs_draft:
        draft_partials = floats(num_requests, 6, num_tiles)
        scan.draft_statistics_kernel[(num_requests, num_tiles)](
            draft_partials, row_ints, row_floats, *raw, *draft, cu_num_logits, idx_mapping,
            slots.max_overrides, slots.overrides_so_far, vocab_size, num_tiles,
            TILE_SIZE=TILE_SIZE, PADDED_STEPS=padded_steps,
        )  # fmt: skip
    sampled = integers(num_requests, num_speculative_steps + 1, dtype=torch.int64)
    num_sampled, target_lse, draft_lse = integers(num_requests), floats(num_requests), floats(num_requests)
    trace = None
    if collect:
        action = torch.full((num_rows,), -1, dtype=torch.int32, device=raw_logits.device)
        trace = Trace(floats(num_rows, NUM_STATISTICS), action, floats(num_rows))
    hidden_1, hidden_2 = program.hidden
    scan.scan_kernel[(num_requests,)](
        sampled, sampled.stride(0), num_sampled, target_lse, draft_lse, counters,
        *((trace.statistics, trace.action, trace.probability) if trace else (None, None, None)),
        draft_partials, row_ints, row_floats, *((*raw, *draft) if needs_draft else (None, 0, None, 0, 0)),
        draft_sampled, cu_num_logits, idx_mapping, pos, temperature, seed,
        slots.arbitrated, slots.threshold, slots.max_overrides, slots.overrides_so_far, slots.response_start,
        slots.forced if collect else None,
        program.weights, vocab_size, num_tiles, num_speculative_steps,
        program.first, program.second, program.seed, program.window,
        TILE_SIZE=TILE_SIZE, PADDED_TILES=triton.next_power_of_2(num_tiles), PADDED_STEPS=padded_steps,
        POLICY=program.code, NEEDS_DRAFT=needs_draft, COLLECT=collect, SAMPLE_ACTIONS=sample_actions,
        HIDDEN_1=hidden_1, HIDDEN_2=hidden_2,
        PADDED_1=triton.next_power_of_2(hidden_1), PADDED_2=triton.next_power_of_2(max(hidden_2, 16)),
        **SCAN_OPTIONS,
    )  # fmt: skip
    if verdict is not None:
        return Verified(sampled, num_sampled, trace)
    _resample(
        sampled, num_sampled, target_lse, draft_lse, processed, draft, draft_sampled, cu_num_logits, pos,
        expanded_idx_mapping, temperature, seed, vocab_size, use_fp64,
    )  # fmt: skip
    return Verified(sampled, num_sampled, trace)


def _resample(
    sampled: Tensor,
    num_sampled: Tensor,
    target_lse: Tensor,
    draft_lse: Tensor,
    processed: tuple[Tensor, int],
    draft: tuple[Any, int, int],
    draft_sampled: Tensor,
    cu_num_logits: Tensor,
    pos: Tensor,
    expanded_idx_mapping: Tensor,
    temperature: Tensor,
    seed: Tensor,
    vocab_size: int,
    use_fp64: bool,
) -> None:
    """Draw the bonus token, or the replacement of a sampled request's rejected draft, with vLLM's own kernels."""
    num_requests = num_sampled.shape[0]
    num_blocks = triton.cdiv(vocab_size, RESAMPLE_BLOCK_SIZE)
    argmax = sampled.new_empty(num_requests, num_blocks)
    value = target_lse.new_empty(num_requests, num_blocks, dtype=torch.float64 if use_fp64 else torch.float32)
    has_draft = draft[0] is not None
    stock._resample_kernel[(num_requests, num_blocks)](
        argmax, argmax.stride(0), value, value.stride(0), *processed, target_lse, *draft, draft_lse,
        num_sampled, cu_num_logits, expanded_idx_mapping, draft_sampled, temperature, seed, pos,
        None,  # block verification
        None, 0, None, None, 0, 0,  # watermarking
        vocab_size,
        BLOCK_SIZE=RESAMPLE_BLOCK_SIZE, HAS_DRAFT_LOGITS=has_draft, USE_FP64=use_fp64, USE_BLOCK_VERIFICATION=False,
        CONTEXT_WIDTH=1, WATERMARK=False, DEDUPLICATE_CONTEXTS=False,
    )  # fmt: skip
    stock._insert_resampled_kernel[(num_requests,)](
        sampled, sampled.stride(0), num_sampled, argmax, argmax.stride(0), value, value.stride(0), num_blocks,
        cu_num_logits, expanded_idx_mapping, temperature,
        PADDED_RESAMPLE_NUM_BLOCKS=triton.next_power_of_2(num_blocks),
    )  # fmt: skip


def warm_up(
    vocab_size: int,
    dtype: torch.dtype,
    draft_logits: Tensor | None,
    num_speculative_steps: int,
    program: Program,
    device: torch.device,
    use_fp64: bool = False,
    collect: bool = False,
    sample_actions: bool = False,
    given_verdict: bool = False,
) -> None:
    """Compile every variant a server with these settings can launch, on a batch of one request.

    The variants differ in whether the processed logits are the raw ones, or, with a given verdict, in what was drawn;
    and, where rows are not a multiple of 16 bytes long, in whether the first row of a chunk happens to be aligned.
    Whether rows are greedy is decided at run time. ``draft_logits`` is only read.
    """
    rows, k = num_speculative_steps + 1, num_speculative_steps
    num_slots = 1 if draft_logits is None else draft_logits.shape[0]

    def constant(size: int, value: float, of: torch.dtype) -> Tensor:
        return torch.full((size,), value, dtype=of, device=device)

    logits = torch.zeros(rows, vocab_size, dtype=dtype, device=device)
    integer = torch.int32
    slots = Slots(
        *(constant(num_slots, value, torch.float32 if name == "threshold" else integer)
          for name, value in zip((f.name for f in fields(Slots)), (1, 0.5, UNLIMITED, 0, 0, 1, -1), strict=True))
    )  # fmt: skip
    chunks = [logits]
    if not given_verdict and vocab_size * logits.element_size() % 16:
        chunks.append(torch.zeros(rows + 1, vocab_size, dtype=dtype, device=device)[1:])
    variants: list[tuple[Tensor, Tensor, Verdict | None]] = []
    for raw in chunks:
        variants += [(raw, raw, None), (raw, raw.to(torch.float32, copy=True), None)]
    if given_verdict:  # Model Runner V1 verifies no chunks
        variants = [(logits, logits, verdict) for verdict in _verdicts(k, vocab_size, num_slots, device)]
    for raw, processed, verdict in variants:
        arbitrate(
            raw,
            processed,
            draft_logits,
            constant(rows, 1, integer),
            torch.arange(0, rows + 1, rows, dtype=integer, device=device),
            torch.arange(rows, dtype=torch.int64, device=device),
            constant(1, 0, torch.int64),
            constant(rows, 0, torch.int64),
            torch.arange(rows, dtype=integer, device=device),
            constant(num_slots, 0.0 if given_verdict else 1.0, torch.float32),
            constant(num_slots, 0, torch.int64),
            k,
            slots,
            program,
            constant(k + 1, 0, torch.int64),
            use_fp64,
            collect,
            sample_actions,
            verdict,
        )


def _verdicts(k: int, vocab_size: int, num_slots: int, device: torch.device) -> list[Verdict]:
    """Return a verdict of every form: of a greedy batch, and of sampled ones without and with draft probabilities."""
    drafts = torch.ones(k, dtype=torch.int32, device=device)
    rows = torch.zeros(k, vocab_size, device=device)
    place = torch.zeros(k, dtype=torch.int64, device=device)
    proposed = torch.ones(num_slots, k, dtype=torch.int32, device=device)
    temperature, uniform = torch.ones(1, device=device), torch.ones(k, dtype=torch.float64, device=device)
    return [
        Verdict(drafts, place, proposed, rows, place),
        Verdict(drafts, place, proposed, rows, place, temperature, rows, None, drafts, uniform),
        Verdict(drafts, place, proposed, rows, place, temperature, rows, rows, drafts, uniform),
    ]
