"""Every kernel variant a server can launch, and stock vLLM's beside them, for the offline report."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as stock

from benchmarks.offline import Launch, compile_launch, recorded_launches
from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels.policy import JOINT, Policy, policy_class, policy_names
from vllm_cospec.kernels.triton import joint, launch, layout, mismatch, scan, target, verdict
from vllm_cospec.kernels.triton.launch import ServerShapes, warm_up
from vllm_cospec.kernels.triton.policies import compile_policy

REQUIRED: dict[str, dict[str, Any]] = {
    "cascade": {"alpha": 0.5},
    "kl": {"max_kl": 1.0},
    "random": {"rate": 0.5},
    "ears": {"tolerance": 0.5},
    "mixture": {"weight": 0.7},
    "fsd": {"max_divergence": 0.3},
    "learned": {"artefact": "-"},
}
MODULES = (target, verdict, mismatch, joint, scan, stock)
"""Where the kernels of a step are found."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPORTED = ("bf16",)
"""Logits of the whole report, which models are served with; other types take ``only``."""


def policies(num_draft_tokens: int) -> Iterator[tuple[Policy, Arbiter | None]]:
    """Every policy, with parameters that leave its code as it is; the learned one with one and two layers."""
    for name in policy_names():
        policy = policy_class(name)(**REQUIRED.get(name, {}))
        if num_draft_tokens > 1 or name != "fly":  # which needs a draft that follows
            policy = policy.for_block_length(num_draft_tokens)
            networks = (None,) if policy.arbiter is None else (Arbiter((32,)), Arbiter((32, 32)))
            yield from ((policy, network) for network in networks)


def launches(
    vocab_size: int, num_draft_tokens: int, dtypes: Collection[str] = tuple(DTYPES)
) -> Iterator[tuple[str, Launch]]:
    """Yield (variant, launch) of everything that can be launched on such logits, each compiled program once."""
    seen: set[tuple[Any, ...]] = set()
    cpu = torch.device("cpu")
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        for has_draft in (True, False):
            logits = torch.empty(1, num_draft_tokens, vocab_size, dtype=dtype) if has_draft else None
            for policy, arbiter in policies(num_draft_tokens):
                if policy.needs_draft_logits and not has_draft:
                    continue
                for collect in (False, True):
                    program = compile_policy(policy, cpu, arbiter, collect)
                    with recorded_launches(*MODULES) as recorded:
                        for v1, scores in product((False, True), {False, arbiter is not None}):
                            server = ServerShapes(
                                vocab_size, dtype, logits, num_draft_tokens, cpu, given_verdict=v1, counts_scores=scores
                            )
                            warm_up(server, program)
                    for one in recorded:
                        if one.name.startswith("_"):  # stock's own, listed below
                            continue
                        key = _identity(one)
                        if key not in seen:
                            seen.add(key)
                            yield _describe(one, dtype_name, policy.policy), one
            with recorded_launches(stock) as recorded:
                _stock_step(vocab_size, num_draft_tokens, dtype, logits)
            for one in recorded:
                key = _identity(one)
                if key not in seen:
                    seen.add(key)
                    yield _describe(one, dtype_name, "stock"), one


def _stock_step(vocab_size: int, k: int, dtype: torch.dtype, draft: torch.Tensor | None) -> None:
    rows = k + 1
    stock.rejection_sample(
        torch.zeros(rows, vocab_size, dtype=dtype), draft, torch.ones(rows, dtype=torch.int32),
        torch.tensor([0, rows], dtype=torch.int32), torch.arange(rows), torch.zeros(1, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64), torch.arange(rows, dtype=torch.int32), torch.ones(1),
        torch.zeros(1, dtype=torch.int64), k,
    )  # fmt: skip


def _identity(one: Launch) -> tuple[Any, ...]:
    """What decides which program is compiled: argument types, alignment of integers, constants."""
    parts: list[Any] = [one.name, one.num_warps]
    for parameter in one.kernel.params:
        value = one.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            parts.append(value.dtype)
        elif parameter.is_constexpr or value is None:
            parts.append(value)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            parts.append((value == 1, value % 16 == 0))
        else:
            parts.append(type(value))
    return tuple(map(str, parts))


def _describe(one: Launch, dtype: str, policy: str) -> str:
    """Return what sets a variant apart from the others of its kernel."""
    flags = one.arguments
    words = [dtype]
    if flags.get("SEPARATE"):
        words.append("processed fp32")
    beside = one.name in ("mismatch_kernel", "joint_kernel", "scan_kernel") and flags["draft_ptr"] is not None
    if beside or flags.get("HAS_DRAFT_LOGITS"):
        words.append("draft logits")
    if one.name == "given_verdict_kernel":
        words.append("greedy" if flags["ratio_ptr"] is None else "sampled")
    elif flags.get("temperature_ptr", 0) is None:
        words.append("given verdict")
    if "POLICY" in flags:
        words.append(policy)
        if flags["HIDDEN_1"] > 1:
            words.append(f"{flags['HIDDEN_1']}x{flags['HIDDEN_2']}" if flags["HIDDEN_2"] else f"{flags['HIDDEN_1']}")
    elif one.name == "joint_kernel":
        words.append({kind: name for name, kind in JOINT.items()}[flags["KIND"]])
    elif flags.get("KIND"):
        kinds = {layout.ENTROPY.value: "entropy", layout.RANK.value: "rank", layout.TOP_K.value: f"top {flags['K']}"}
        words.append(kinds[flags["KIND"]])
    if flags.get("scores_ptr") is not None:
        words.append("scores")
    if flags.get("COLLECT"):
        words.append("collect")
    return ", ".join(words)


def bytes_per_row(one: Launch, vocab_size: int) -> int:
    """Bytes of logits the stage moves for one sampled, arbitrated row; a greedy row leaves out the draft's."""

    def size(name: str) -> int:
        tensor = one.arguments.get(name)
        return 0 if tensor is None else tensor.element_size() * vocab_size

    if one.name == "target_statistics_kernel":
        return size("processed_ptr") + size("draft_ptr") + (size("raw_ptr") if one.arguments["SEPARATE"] else 0)
    if one.name in ("mismatch_kernel", "joint_kernel"):
        return size("raw_ptr") + size("draft_ptr")
    if one.name in ("_compute_local_logits_stats_kernel", "_resample_kernel"):
        return size("target_logits_ptr") + size("draft_logits_ptr")
    return 0


def _trips(arguments: dict[str, Any]) -> int:
    """Return how often an innermost loop runs: over the parts of a block; other loops once."""
    return int(arguments["BLOCK_SIZE"] // arguments["TILE_SIZE"]) if "TILE_SIZE" in arguments else 1


@contextlib.contextmanager
def tuned(target: str) -> Iterator[None]:
    """Launch as on a machine with such a GPU."""
    before = launch.tuning
    launch.tuning = launch.NVIDIA if target.startswith("sm_") else launch.AMD
    try:
        yield
    finally:
        launch.tuning = before


def report(targets: list[str], vocab_size: int, num_draft_tokens: int, only: list[str]) -> list[dict[str, Any]]:
    """Compile every variant for every target.

    Args:
        targets: some of ``offline.TARGETS``.
        vocab_size: of the logits.
        num_draft_tokens: K.
        only: keeps those whose "kernel: variant" contains one of these; nothing: all on ``REPORTED`` logits.
    """
    rows = []
    for gpu in targets:
        with tuned(gpu):
            found = [
                (variant, one, compile_launch(one, gpu))
                for variant, one in launches(vocab_size, num_draft_tokens, DTYPES if only else REPORTED)
                if not only or any(text in f"{one.name}: {variant}" for text in only)
            ]
        rows += [
            {
                "kernel": one.name,
                "variant": variant,
                "target": gpu,
                "registers": compiled.registers,
                "spill_bytes": compiled.spill_bytes,
                "shared_bytes": compiled.shared_bytes,
                "bytes_per_row": bytes_per_row(one, vocab_size),
                "warps": one.num_warps,
                "instructions": compiled.code.instructions,
                "executed": compiled.code.executed(_trips(one.arguments)),
                "barriers": compiled.code.barriers,
                "loads": " ".join(f"{count}x{bits}" for bits, count in sorted(compiled.code.loads.items())),
            }
            for variant, one, compiled in found
        ]
    return rows
