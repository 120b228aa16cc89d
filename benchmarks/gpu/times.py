"""Times of verification: every policy, and stage by stage, beside stock's and a plain read of the same rows."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu.cases import BATCHES, VOCAB_SIZES, generated, timed_case
from benchmarks.gpu.clock import Clock, read_once
from benchmarks.gpu.processes import spread
from benchmarks.variants import MODULES
from vllm_cospec.kernels.policies import policy_names

READ, STOCK = "read the rows once", "stock"


def settings(vocab_sizes: tuple[int, ...], batches: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """Return (vocabulary, batch, sampled), what matters most first: should the time run out, the rest is missing."""
    return [
        (vocab, batch, sampled)
        for vocab in vocab_sizes
        for sampled in (False, True)
        for batch in sorted(batches, key=lambda size: (size != 64, size))
    ]


def measure(
    device: torch.device,
    until: float,
    workers: int = 1,
    vocab_sizes: tuple[int, ...] = VOCAB_SIZES,
    batches: tuple[int, ...] = BATCHES,
) -> dict[str, Any]:
    """Time every setting until the monotonic clock says ``until``; returns rows and what was left out."""
    if workers > 1:
        spread(precompile, [(vocab, name, device) for vocab in vocab_sizes for name in policy_names()], workers)
    clock, rows, left_out = Clock(device), [], []
    for vocab, batch, sampled in settings(vocab_sizes, batches):
        if time.monotonic() > until:
            left_out.append([vocab, batch, "sampled" if sampled else "greedy"])
            continue
        rows += _setting(clock, vocab, batch, sampled, device)
        torch.cuda.empty_cache()
    return {"rows": rows, "left_out": left_out}


def precompile(setting: tuple[int, str, torch.device]) -> None:
    """Put the kernels of (vocabulary, policy, device) into Triton's cache, where another process finds them."""
    vocab, name, device = setting
    for sampled in (False, True):
        timed_case(vocab, 1, sampled, device).ours(generated.POLICIES[name], generated.arbiter(32, 32))
    torch.cuda.synchronize(device)


def _setting(clock: Clock, vocab: int, batch: int, sampled: bool, device: torch.device) -> list[dict[str, Any]]:
    case, network = timed_case(vocab, batch, sampled, device), generated.arbiter(32, 32)
    common = {"vocab": vocab, "batch": batch, "draws": "sampled" if sampled else "greedy"}
    first, request_slot, slot, step = case.layout()
    stock = (
        case.processed, case.draft, case.draft_sampled, first, case.pos, request_slot, slot, step, case.temperature,
        case.seed, case.num_speculative_steps,
    )  # fmt: skip
    calls = {READ: read_once(case.raw), STOCK: lambda: generated.rejection_sample(*stock)}
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        on_device, on_host = clock.median_us(call)
        rows.append({**common, "what": name, "device_us": on_device, "host_us": on_host})
    for name in policy_names():
        call, counters, _ = case.prepared(generated.POLICIES[name], network)
        on_device, on_host = clock.median_us(call)
        *overrides, mismatches = counters[: case.num_speculative_steps + 1].tolist()
        row: dict[str, Any] = {**common, "what": name, "device_us": on_device, "host_us": on_host,
               "kept_of_mismatches": sum(overrides) / mismatches if mismatches else None}  # fmt: skip
        if name in ("learned", "typical"):
            row["stages_us"] = clock.stages_us(call, MODULES)
        rows.append(row)
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every time beside stock's and the plain read's of the same setting."""

    def setting(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["vocab"], row["batch"], row["draws"]

    base = {(*setting(row), row["what"]): row["device_us"] for row in rows if row["what"] in (READ, STOCK)}
    return [
        row | {"of_stock": row["device_us"] / base[*setting(row), STOCK],
               "of_read": row["device_us"] / base[*setting(row), READ]}
        for row in rows
    ]  # fmt: skip
