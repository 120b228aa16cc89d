"""What a verification step should take on a GPU: a model of bytes, instructions and launches. Nothing is measured.

    python -m benchmarks.cost

A kernel takes

    start + max(bytes / bandwidth, warp instructions / issue rate, rounds of programs x latency of one)

and a step the sum over its kernels: each waits for the one before. What is assumed stands in :class:`Card`,
:class:`VerificationStep` and :func:`kernels`. Instructions are those of the compiled programs, by the committed report
of ``benchmarks/kernel.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPORT = Path(__file__).parent / "results" / "kernel_offline.json"
VOCAB_SIZE, NUM_DRAFT_TOKENS = 151_936, 5
STOCK_DRAW_BLOCK, DRAW_BLOCK = 1_024, 2_048  # tokens that a program of the last stage draws from: stock's, ours
STOCK_FIRST_PASS = "_compute_local_logits_stats_kernel"
TARGETS = {"H100": "sm_90", "MI300X": "gfx942"}
RULE_SCAN = "scan_kernel of a rule"
# Of every kernel, the variant that a batch of greedy and one of sampled requests run. Our first pass has a variant
# without the branch of sampled rows; for stock's see `without_the_other_branch`. Others count with every branch, once.
VARIANTS: dict[str, tuple[str, str]] = {
    "target_statistics_kernel": ("bf16, given verdict", "bf16, draft logits"),
    "verdict_kernel": ("bf16", "bf16, draft logits"),
    "mismatch_kernel": ("bf16, draft logits", "bf16, draft logits"),
    "scan_kernel": ("bf16, draft logits, learned, 32x32", "bf16, draft logits, learned, 32x32"),
    RULE_SCAN: ("bf16, typical", "bf16, typical"),
    "_compute_local_logits_stats_kernel": ("bf16", "bf16, draft logits"),
    "_rejection_kernel": ("bf16", "bf16, draft logits"),
    "_resample_kernel": ("bf16", "bf16, draft logits"),
    "_insert_resampled_kernel": ("bf16", "bf16"),
}


@dataclass(frozen=True)
class Card:
    """A GPU. The first line is from its maker's data sheet, the second is assumed."""

    bandwidth: float  # bytes per microsecond
    processors: int
    mhz: float
    issued: float  # warp (wave) instructions that a processor issues in a cycle
    cache: float  # bytes of last-level cache
    efficiency: float = 0.9  # share of the bandwidth that a plain read reaches
    start: float = 2.0  # microseconds from one kernel's end until the next one's programs run, and until they are gone
    resident: int = 16  # programs of four warps at once on a processor
    cycles: float = 6.0  # from an instruction to the next that needs its result
    read_latency: float = 0.8  # microseconds until a read arrives
    kept_in_cache: float = 0.6  # share of the cache that still holds what was read last


CARDS = {
    "H100": Card(3.35e6, 132, 1_755, 4, 50e6),
    "MI300X": Card(5.3e6, 304, 2_100, 1, 256e6, start=3.0),
}


@dataclass(frozen=True)
class VerificationStep:
    """A step: how many requests, what they draw, how often target and draft agree."""

    batch: int
    sampled: bool
    vocab: int = VOCAB_SIZE
    steps: int = NUM_DRAFT_TOKENS
    agreement: float = 0.7
    bytes_per_logit: int = 2

    @property
    def row(self) -> float:
        """Bytes of a row of logits."""
        return self.vocab * self.bytes_per_logit

    @property
    def complete(self) -> float:
        """Share of blocks without a rejection."""
        return self.agreement**self.steps

    @property
    def rejected(self) -> float:
        """Rejected positions of a block."""
        return self.steps * (1 - self.agreement)


@dataclass(frozen=True)
class Kernel:
    """One launch: programs that have something to do, all programs, and what those that work need."""

    name: str
    working: float
    programs: float
    instructions: float  # that each of its warps executes
    bytes: float
    cached: float = 0.0  # bytes of those that were read just before
    reads: float = 1  # that wait for one another
    warps: int = 4


def microseconds(kernel: Kernel, card: Card) -> float:
    """Return what a kernel takes."""
    hits = min(kernel.cached, kernel.cached * _held(kernel, card))
    memory = (kernel.bytes - hits) / (card.bandwidth * card.efficiency)
    issue = kernel.working * kernel.warps * kernel.instructions / (card.processors * card.issued * card.mhz)
    at_once = card.processors * card.resident
    alone = kernel.instructions * card.cycles / card.mhz + kernel.reads * card.read_latency
    # programs without work read whether they have some, and end
    rounds = max(math.ceil(kernel.programs / at_once) * card.read_latency, alone)
    return card.start + max(memory, issue, rounds)


def _held(kernel: Kernel, card: Card) -> float:
    """Return the share of what was read before that is still in the cache."""
    return min(1.0, card.kept_in_cache * card.cache / kernel.cached) if kernel.cached else 0.0


@dataclass(frozen=True)
class ProgramWork:
    """What one program of a kernel executes."""

    instructions: int  # each of its warps
    warps: int = 4


def kernels(which: str, traffic: VerificationStep, counts: Mapping[str, ProgramWork]) -> list[Kernel]:
    """Return the launches of a step.

    Args:
        which: ``stock``, ``rule`` for a policy that reads nothing of the draft, or ``learned``.
        traffic: the step.
        counts: what a program executes, by kernel.
    """
    t, blocks = traffic, math.ceil(traffic.vocab / 8192)
    rows = t.batch * t.steps
    pairs = 2 if t.sampled else 1  # strict verification of a sampled row reads the draft's beside the target's
    drawn = t.batch * (t.complete + (2 * (1 - t.complete) if t.sampled else 0))  # rows the last token is drawn from
    drawing = t.batch * (1.0 if t.sampled else t.complete)
    first_pass = rows * pairs * t.row
    larger = 1 if which == "stock" else DRAW_BLOCK // STOCK_DRAW_BLOCK  # a program's part of the vocabulary
    draw_blocks = math.ceil(t.vocab / (STOCK_DRAW_BLOCK * larger))

    def kernel(
        name: str, programs: float, size: float = 0.0, working: float | None = None, times: int = 1, **options: Any
    ) -> Kernel:
        busy, work = programs if working is None else working, counts[name]
        return Kernel(name, busy, programs, times * work.instructions, size, warps=work.warps, **options)

    draw = [
        kernel("_resample_kernel", t.batch * draw_blocks, drawn * t.row, drawing * draw_blocks, reads=2, times=larger),
        kernel("_insert_resampled_kernel", t.batch, reads=3),
    ]
    if which == "stock":
        first = kernel("_compute_local_logits_stats_kernel", (rows + t.batch) * blocks, first_pass, rows * blocks)
        return [first, kernel("_rejection_kernel", t.batch, reads=2 * t.steps), *draw]
    first = kernel("target_statistics_kernel", (rows + t.batch) * blocks, first_pass, rows * blocks)
    steps = [first, kernel("verdict_kernel", rows + t.batch, reads=3)]
    if which == "learned":
        again = t.batch * t.rejected
        steps.append(
            kernel(
                "mismatch_kernel", t.batch * blocks, 2 * again * t.row, again * blocks,
                cached=again * t.row * pairs, reads=4,
            )
        )  # fmt: skip
    # A rule's positions are read together, behind the request's place and slot; of a mismatch whose rows were read
    # again first the sums, then single logits.
    scan, waits = ("scan_kernel", 2 + 2 * t.rejected) if which == "learned" else (RULE_SCAN, 2)
    return [*steps, kernel(scan, t.batch, reads=waits), *draw]


def step_us(which: str, traffic: VerificationStep, card: Card, counts: Mapping[str, ProgramWork]) -> float:
    """Return what a step takes, as above."""
    return sum(microseconds(kernel, card) for kernel in kernels(which, traffic, counts))


def estimates(counts: Mapping[str, Mapping[bool, Mapping[str, ProgramWork]]]) -> list[dict[str, Any]]:
    """Return the table: every card, batch and way of drawing, beside stock.

    Args:
        counts: what programs execute, by card, by whether requests are sampled, and by kernel.
    """
    rows = []
    for name, card in CARDS.items():
        for sampled in (False, True):
            for batch in (1, 8, 64, 256):
                traffic = VerificationStep(batch, sampled)
                took = {
                    which: step_us(which, traffic, card, counts[name][sampled])
                    for which in ("stock", "rule", "learned")
                }
                rows.append(
                    {"gpu": name, "draws": "sampled" if sampled else "greedy", "batch": batch,
                     "basis": "estimated, not measured", **{f"{which}_us": us for which, us in took.items()},
                     "rule_over_stock": took["rule"] / took["stock"],
                     "learned_over_stock": took["learned"] / took["stock"]}
                )  # fmt: skip
    return rows


def counts_of(offline: list[dict[str, Any]]) -> dict[str, dict[bool, dict[str, ProgramWork]]]:
    """Return what programs execute, as :func:`estimates` takes it, from the rows of the compile report."""
    found: dict[str, dict[bool, dict[str, ProgramWork]]] = {}
    for card, target in TARGETS.items():
        programs = {
            (row["kernel"], row["variant"]): ProgramWork(row["executed"], row["warps"])
            for row in offline
            if row["target"] == target
        }
        found[card] = {
            sampled: {name: programs[name.partition(" ")[0], variants[sampled]] for name, variants in VARIANTS.items()}
            for sampled in (False, True)
        }
        without_the_other_branch(found[card])
    return found


def without_the_other_branch(works: dict[bool, dict[str, ProgramWork]], name: str = STOCK_FIRST_PASS) -> None:
    """Leave out of stock's first pass the branch that a row does not take.

    It has one for greedy rows, and one for sampled rows which draft logits make longer by about its own length.
    """
    short, long = works[False][name].instructions, works[True][name].instructions
    greedy = 2 * short - long
    works[False][name] = replace(works[False][name], instructions=greedy)
    works[True][name] = replace(works[True][name], instructions=long - greedy)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the documentation: microseconds, and how often stock's they are."""
    lines = ["| GPU | draws | batch | stock | a rule | `learned` |", "|---|---|---|---|---|---|"]
    for row in rows:
        rule, learned = (
            f"{row[f'{which}_us']:.0f} ({row[f'{which}_over_stock']:.2f})" for which in ("rule", "learned")
        )
        cells = (row["gpu"], row["draws"], row["batch"], f"{row['stock_us']:.0f}", rule, learned)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Print what verification is estimated to take on two GPUs that are not here."""
    print(f"Estimated, not measured: microseconds of a step; V = {VOCAB_SIZE:,}, K = {NUM_DRAFT_TOKENS}, bf16")
    print(markdown(estimates(counts_of(json.loads(REPORT.read_text())["offline"]))))


if __name__ == "__main__":
    main()
