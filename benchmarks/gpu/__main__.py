"""The kit for a GPU: whether the kernels are right there, how fast they are, and whether an engine runs on them.

    make gpu
    python -m benchmarks.gpu [--parts kernels,times,engine,sanitizer] [--minutes 10] [--workers N] [--json FILE]

Needs CUDA or ROCm, torch, Triton 3.6 or newer, vLLM and this project installed; kernels and times also run without
vLLM's compiled modules. Ends with code 1 after a wrong answer. Parts that the machine cannot run say so.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.command import run
from benchmarks.gpu.processes import available
from vllm_cospec.atomic import write_text
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.measure.provenance import write_result

# Parts in the order in which they run, and the share of the time that each may take.
PARTS = {"kernels": 0.25, "times": 0.35, "engine": 0.25, "sanitizer": 0.15}


def chosen(text: str) -> list[str]:
    """Return the parts that are named, in the order in which they run.

    Raises:
        ConfigError: there is no such part.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        what = f"{unknown[0]!r} is no part" if unknown else "names no part"
        raise ConfigError(f"--parts: {what}; choose from {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def gpu() -> torch.device:
    """Return the device.

    Raises:
        ConfigError: there is none.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this kit needs a GPU, and torch finds neither CUDA nor ROCm; run it on a machine with one")
    return torch.device("cuda", torch.cuda.current_device())


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a result on this device is named by."""
    import triton

    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "architecture": facts.gcnArchName if torch.version.hip else f"sm_{facts.major}{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "triton": triton.__version__,
    }


def wrong(kernels: dict[str, dict[str, Any]]) -> list[str]:
    """Return the comparisons that found a difference, or compared nothing, in sentences."""
    sentences = [
        f"{name}: {one['differences']} differences, the first: {one['first_differences'][0]}"
        for name, one in kernels.items()
        if one["differences"]
    ]
    return sentences + [f"{name}: nothing was compared" for name, one in kernels.items() if not one["requests"]]


def measure(parts: list[str], minutes: float, repetitions: int, workers: int, device: torch.device) -> dict[str, Any]:
    """Run the parts, each for its share of the time; returns the report."""
    began, total = time.monotonic(), sum(PARTS[name] for name in parts)
    report: dict[str, Any] = {"schema": 1, "device": describe(device), "parts": parts, "problems": []}
    used = 0.0
    for name in parts:
        used += PARTS[name] / total
        until = began + 60 * minutes * used
        if name == "kernels":
            from benchmarks.gpu import compare

            report[name] = compare.everything(device, repetitions, until, workers)
            report["problems"] += wrong(report[name])
        elif name == "times":
            from benchmarks.gpu import times

            report[name] = times.measure(device, until, workers)
            report[name]["rows"] = times.ratios(report[name]["rows"])
        elif name == "engine":
            from benchmarks.gpu import engine

            torch.cuda.empty_cache()
            report[name] = engine.measure(until - time.monotonic())
            report["problems"] += engine.problems(report[name])
        else:
            from benchmarks.gpu import sanitize

            report[name] = sanitize.measure(until - time.monotonic())
            report["problems"] += sanitize.problems(report[name])
    report["minutes"] = round((time.monotonic() - began) / 60, 1)
    return report


def main(
    parts: Annotated[str, typer.Option(help=f"What to run: {', '.join(PARTS)}.")] = ",".join(PARTS),
    minutes: Annotated[float, typer.Option(min=0.1, help="How long it may take, about.")] = 10,
    repetitions: Annotated[int, typer.Option(min=1, help="How many generated batches: 100 of each.")] = 14,
    workers: Annotated[
        int, typer.Option(min=1, help="How many processes compile and compare.", show_default="by the number of cores")
    ] = available(),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write its tables to this file.")] = None,
) -> None:
    """Check and time verification on this machine's GPU."""
    names = chosen(parts)
    report = measure(names, minutes, repetitions, workers, gpu())
    from benchmarks.gpu.report import markdown as tables

    text = tables(report)
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    if json_path is not None:
        write_result(json_path, report)
    if markdown is not None:
        write_text(markdown, text)
    if report["problems"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
