"""What the decisions of a step take in a running engine on the CPU: the bundled pair, sixteen requests at a time.

    python benchmarks/in_place.py [--rounds 6] [--json FILE]

Engines with stock verification, the bundled arbiter and a rule are alive at once and take turns on the same prompts.
Of every step with a full batch the time is taken that this package's own functions run, without what they call of
vLLM's, and for stock the time of its rejection sampler without its bonus tokens, which both draw alike.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run
from benchmarks.side_by_side import BUNDLED, MAX_TOKENS, build_engines, cospec, stock, turns
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.tasks import load_task

NUM_PROMPTS = 96
OF_RECORDER = {  # this package's method, and vLLM's that it calls
    "propose": "_propose", "update_states": "_update_states", "take_draft_token_ids": "_take_draft_token_ids",
    "prepare_next_tokens": "_prepare_next_tokens", "set_inputs_first_pass": "_set_inputs_first_pass",
    "update_positions": "_update_positions",
}  # fmt: skip
WRAPPED = {  # where vLLM calls those
    "propose": "drafter.propose", "update_states": "_update_states", "take_draft_token_ids": "take_draft_token_ids",
    "prepare_next_tokens": "drafter.prepare_next_token_ids_padded",
    "set_inputs_first_pass": "drafter.set_inputs_first_pass",
    "update_positions": "drafter._update_positions_dependent_metadata",
}  # fmt: skip


@dataclass
class StopWatch:
    """Adds up the time of some functions, without that of others they call."""

    running: list[float] = field(default_factory=list)  # of each function that runs, when what is counted of it began
    step: float = 0.0  # seconds

    def counted(self, function: Callable[..., Any], counts: bool) -> Callable[..., Any]:
        """Return a function whose time counts, or is taken out of that of whoever calls it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self.running.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - began
                own = whole - self.running.pop()
                self.step += own * counts
                if self.running:
                    self.running[-1] += whole

        return call


def replace_method(watch: StopWatch, root: Any, path: str, counts: bool) -> None:
    """Put the watch around a method; ``path`` leads there from ``root``."""
    *parents, name = path.split(".")
    for parent in parents:
        root = getattr(root, parent)
    setattr(root, name, watch.counted(getattr(root, name), counts))


def watch_engine(engine: Any, batch: int) -> list[float]:
    """Return a list that is filled with the milliseconds of every step of a full batch that verifies drafts."""
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    sampler, watch, steps = runner.rejection_sampler, StopWatch(), []
    verified = [False]
    forward = watch.counted(sampler.forward, True)

    def note(*args: Any, **kwargs: Any) -> Any:
        verified[0] = runner.input_batch.num_reqs == batch
        return forward(*args, **kwargs)

    sampler.forward = note
    sampler.sampler.forward = watch.counted(sampler.sampler.forward, False)
    recorder = getattr(sampler, "recorder", None)
    for ours, path in WRAPPED.items() if recorder is not None else ():
        replace_method(watch, runner, path, True)
        replace_method(watch, recorder, OF_RECORDER[ours], False)
    if recorder is not None:
        replace_method(watch, runner, "drafter._sample_draft_tokens", False)  # stock's beside: not told apart
    step = engine.llm_engine.step

    def timed() -> Any:
        watch.step, verified[0] = 0.0, False
        result = step()
        if verified[0]:
            steps.append(watch.step * 1e3)
        return result

    engine.llm_engine.step = timed
    return steps


def main(
    rounds: Annotated[int, typer.Option(min=1, help="In each, every engine answers every prompt once.")] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="K.")] = 7,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Measure what decisions take in running engines."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    drafts = str(BUNDLED / "draft"), num_speculative_tokens
    policies: dict[str, dict[str, Any]] = {
        "learned": {"policy": "learned", "artefact": str(BUNDLED / "arbiter")},
        "relaxed_topk": {"policy": "relaxed_topk", "top_n": 10, "delta": 0.9},
    }
    methods = {"stock": stock(*drafts)} | {name: cospec(*drafts, policy) for name, policy in policies.items()}
    engines = build_engines(str(BUNDLED / "target"), methods, batch)
    from vllm import SamplingParams

    prompts = [problem.prompt for problem in load_task("demo").problems(seed=5, n=NUM_PROMPTS)]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for engine in engines.values():
        engine.generate(prompts, params, use_tqdm=False)
    steps = {name: watch_engine(engine, batch) for name, engine in engines.items()}
    for number in range(rounds):
        for name in turns(engines, number):
            engines[name].generate(prompts, params, use_tqdm=False)
    table = Table("engine", "steps", "ms a step (median)", "90 of 100 take at most", title=f"{batch} requests")
    result: dict[str, Any] = {"schema": 1, "batch": batch, "num_speculative_tokens": num_speculative_tokens}
    for name, values in steps.items():
        deciles = statistics.quantiles(values, n=10)
        result[name] = {"steps": len(values), "median_ms": deciles[4], "ninth_decile_ms": deciles[8]}
        table.add_row(name, str(len(values)), f"{deciles[4]:.2f}", f"{deciles[8]:.2f}")
    Console().print(table)
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    run(main)
