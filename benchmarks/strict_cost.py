"""What it costs to have cospec installed and verify strictly: throughput of ``strict`` against stock vLLM.

Two engines with the same target and draft are alive at once and take turns on the same prompts, so that a noisy machine
hits them alike. The order within a round alternates. Reported: the median over rounds of the ratio within a round.

    python benchmarks/strict_cost.py [--rounds 15] [--num-prompts 128] [--max-concurrency 16] [--json FILE]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run
from benchmarks.side_by_side import BUNDLED, MAX_TOKENS, build_engines, cospec, stock, turns
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.tasks import load_task


def main(
    target: Annotated[str, typer.Option(help="Target model.")] = str(BUNDLED / "target"),
    draft: Annotated[str, typer.Option(help="Draft model.")] = str(BUNDLED / "draft"),
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; in each, both engines answer every prompt once.")] = 15,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts per round.")] = 128,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="K.")] = 7,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Compare strict cospec with stock vLLM in interleaved rounds."""
    methods = {
        "stock": stock(draft, num_speculative_tokens),
        "strict": cospec(draft, num_speculative_tokens, {"policy": "strict"}),
    }
    engines = build_engines(target, methods, max_concurrency)
    from vllm import SamplingParams

    prompts = [problem.prompt for problem in load_task("demo").problems(seed=5, n=num_prompts)]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[str]] = {}
    for name, engine in engines.items():  # warm-up, and the outputs that must be equal
        texts[name] = [output.outputs[0].text for output in engine.generate(prompts, params, use_tqdm=False)]
    for number in track(range(rounds), "rounds", console=Console(stderr=True)):
        for name in turns(engines, number):
            start = time.perf_counter()
            outputs = engines[name].generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            rates[name].append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    ratios = [strict / stock for strict, stock in zip(rates["strict"], rates["stock"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "schema": 1,
        "rounds": rounds,
        "num_prompts": num_prompts,
        "max_concurrency": max_concurrency,
        "same_output": texts["stock"] == texts["strict"],
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "strict_over_stock": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "all": ratios},
    }  # fmt: skip
    table = Table("engine", "tokens/s (median)", title=f"{rounds} interleaved rounds of {num_prompts} prompts")
    for name, value in result["tokens_per_s"].items():  # type: ignore[attr-defined]
        table.add_row(name, f"{value:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"strict / stock: median {quartiles[1]:.3f}, quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}; "
        f"outputs {'identical' if result['same_output'] else 'DIFFER'}"
    )
    if json_path is not None:
        write_result(json_path, result)
    if not result["same_output"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
