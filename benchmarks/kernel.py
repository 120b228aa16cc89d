"""What verification costs: a compile report for GPUs, computed memory floors, and a measured comparison on the CPU.

    python benchmarks/kernel.py [--no-offline] [--no-cpu] [--target sm_90] [--only bf16] [--json FILE]

No GPU is needed and none is used. Nothing printed here is a GPU's speed: the compile report counts registers, spills
and bytes, and the floors are those bytes divided by a data sheet's bandwidth.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run
from benchmarks.gpu.processes import new_interpreters
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.measure.provenance import write_result

VOCAB_SIZE, NUM_DRAFT_TOKENS, AGREEMENT = 151_936, 5, 0.7
BANDWIDTH_TB_PER_S = {"A100 80GB SXM": 2.039, "H100 SXM": 3.35, "B200": 8.0, "MI300X": 5.3, "MI355X": 8.0}
"""Peak memory bandwidth by the makers' data sheets."""


def step_rows(agreement: float, num_draft_tokens: int) -> dict[str, float]:
    """Expected rows of V logits one request moves in a greedy step, and in one sampled at temperature 1.

    Positions agree independently with probability a. Strict verification reads K target rows (sampled: K draft rows as
    well) and then the one row it draws from: the bonus row with probability a^K; a sampled request also reads its
    rejected target and draft row. A policy that looks at the draft adds target and draft row of every rejected
    position, K (1 - a) of them; what overrides save in later steps is left out.
    """
    a, k = agreement, num_draft_tokens
    complete = a**k
    greedy, sampled = k + complete, 2 * k + complete + 2 * (1 - complete)
    extra = 2 * k * (1 - a)
    return {
        "greedy_stock": greedy,
        "greedy_arbitrated": greedy + extra,
        "sampled_stock": sampled,
        "sampled_arbitrated": sampled + extra,
    }


def floors(batch: int, bytes_per_logit: int = 2) -> list[dict[str, Any]]:
    """Memory-bound floor of one verification step on named GPUs, in microseconds. Computed, not measured."""
    row = VOCAB_SIZE * bytes_per_logit
    return [
        {
            "gpu": gpu,
            "batch": batch,
            "basis": "computed, not measured",
            **{
                f"{name}_us": batch * rows * row / (bandwidth * 1e12) * 1e6
                for name, rows in step_rows(AGREEMENT, NUM_DRAFT_TOKENS).items()
            },
        }
        for gpu, bandwidth in BANDWIDTH_TB_PER_S.items()
    ]


def _offline(targets: list[str], only: list[str]) -> list[dict[str, Any]]:
    from vllm_cospec.kernels.triton.stand_in import install

    install()  # before vLLM is imported, which is why this runs in a process of its own
    from benchmarks import variants

    return variants.report(targets, VOCAB_SIZE, NUM_DRAFT_TOKENS, only)


def _measure(rounds: int) -> list[dict[str, Any]]:
    from benchmarks import verification

    large = [(VOCAB_SIZE, batch, NUM_DRAFT_TOKENS) for batch in verification.BATCHES]
    return [verification.compare(*step, AGREEMENT, rounds) for step in [verification.BUNDLED_STEP, *large]]


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    """Run a function in a new interpreter: Triton is switched on in one part of the report and off in the other."""
    with new_interpreters(1) as pool:
        return pool.submit(function, *arguments).result()


def print_tables(console: Console, report: dict[str, Any]) -> None:
    """Print what was found."""

    def show(title: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v
                            for v in row.values()))  # fmt: skip
        console.print(table)

    show("Compiled for GPUs that are not here", report["offline"])
    show(f"Memory floor at V = {VOCAB_SIZE:,}, K = {NUM_DRAFT_TOKENS}, bf16, {AGREEMENT:.0%} agreement: "
         "computed, not measured", report["floor"])  # fmt: skip
    show("Measured on this CPU: whole RejectionSampler.forward, learned policy against stock", report["cpu"])


def main(
    offline: Annotated[bool, typer.Option("--offline/--no-offline", help="Compile for GPUs.")] = True,
    cpu: Annotated[bool, typer.Option("--cpu/--no-cpu", help="Measure on this CPU.")] = True,
    target: Annotated[list[str] | None, typer.Option(help="GPU target of the compile report; left out: all.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help='Compile only "kernel: variant" that contain one of these.')
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of the CPU comparison.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
) -> None:
    """Report what verification costs: compiled for GPUs, computed memory floors, measured on this CPU."""
    from benchmarks.offline import TARGETS

    unknown = sorted(set(target or ()) - set(TARGETS))
    if unknown:
        raise ConfigError(f"--target: {unknown[0]!r} is unknown; choose from {', '.join(TARGETS)}")
    report = {
        "schema": 1,
        "offline": in_fresh_process(_offline, target or list(TARGETS), only or []) if offline else [],
        "floor": [entry for batch in (8, 32, 128) for entry in floors(batch)],
        "cpu": in_fresh_process(_measure, rounds) if cpu else [],
    }
    print_tables(Console(width=180), report)
    if json_path is not None:
        write_result(json_path, report)


if __name__ == "__main__":
    run(main)
