"""Speed and quality side by side: every mode answers the same problems on a real server under the same load.

Modes take turns in rounds, in an order that changes from round to round, so that a noisy machine hits them alike.
``target`` is the target without speculation, ``standard`` stock strict speculative decoding, everything else a policy.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --target Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --arbiter DIR --dataset gsm8k.jsonl
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import load
import openai
import plots
import results
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.policies import policy_names
from vllm_cospec.server import Server, ServerError, interruptible
from vllm_cospec.training.commands import command_line, write_atomically
from vllm_cospec.training.config import bundled
from vllm_cospec.training.tasks import Problem, Task, load_task

NAME = "model"
BUNDLED_ARBITER = str(bundled("target").parent / "arbiter")
BUNDLED_ARGUMENTS = {
    "dtype": "float32", "max-model-len": 128, "max-num-seqs": 32, "kv-cache-memory-bytes": 2**28, "enforce-eager": True
}  # fmt: skip


def speculative_config(mode: str, draft: dict[str, Any], arbiter: str) -> dict[str, Any] | None:
    """Return what ``--speculative-config`` is for a mode; None for no speculation.

    Args:
        mode: target, standard, a policy's name, or a policy as JSON.
        draft: vLLM's keys of the drafter.
        arbiter: directory or hub id for ``learned``.

    Raises:
        ConfigError: no such mode.
    """
    if mode == "target":
        return None
    if mode == "standard":
        return {"method": "draft_model", **draft}
    if mode == "learned":
        return {"method": "cospec", "arbiter": arbiter, **draft}
    try:
        policy = json.loads(mode) if mode.startswith("{") else {"policy": mode}
    except ValueError as error:
        raise ConfigError(f"--modes: {mode!r} is not valid JSON ({error})") from None
    if policy.get("policy") not in policy_names():
        raise ConfigError(
            f"--modes: unknown mode {mode!r}; known are target, standard, {', '.join(policy_names())}, or a policy as "
            f'JSON: {{"policy": "cascade", "alpha": 0.95}}'
        )
    return {"method": "cospec", "arbiter": policy, **draft}


def load_problems(task_name: str, dataset: Path | None, count: int, seed: int) -> tuple[Task, list[Problem]]:
    """Return the task that scores, and the problems to ask."""
    if dataset is not None:
        task = load_task("jsonl", path=str(dataset), test_path=str(dataset))
    elif task_name == "demo":
        task = load_task("demo")
    else:
        task = load_task("reasoning_gym", generator=task_name)
    return task, task.problems(seed, count, "test")


def arguments(options: dict[str, Any]) -> tuple[str, ...]:
    """Turn engine options into arguments of ``vllm serve``."""
    flags: list[str] = ["--served-model-name", NAME]
    for key, value in options.items():
        flags += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return tuple(flags)


def run_mode(server: Server, tally: results.Tally, problems: list[Problem], task: Task, load_options: Any) -> None:
    """Ask one server for every problem once and add what it did to the tally."""
    before, began = server.counters(), time.perf_counter()
    replies = asyncio.run(load.ask(server.url, NAME, [problem.prompt for problem in problems], *load_options))
    seconds, after = time.perf_counter() - began, server.counters()
    scores = [task.score(problem, reply.text) for problem, reply in zip(problems, replies, strict=True)]
    tally.add(replies, scores, seconds, {name: value - before.get(name, 0.0) for name, value in after.items()})


def main(
    target: Annotated[str, typer.Option(help="Target: directory or hub id.")] = str(bundled("target")),
    draft: Annotated[str, typer.Option(help="Draft: directory or hub id.")] = str(bundled("draft")),
    arbiter: Annotated[str, typer.Option(help="Trained arbiter, for learned.")] = BUNDLED_ARBITER,
    modes: Annotated[str, typer.Option(help="Modes, separated by semicolons or commas.")] = "target,standard,learned",
    task: Annotated[str, typer.Option(help="demo, or a reasoning-gym generator.")] = "demo",
    dataset: Annotated[Path | None, typer.Option(help="JSONL of problems instead; GSM8K's format too.")] = None,
    num_prompts: Annotated[int, typer.Option(min=2, help="Problems; every mode answers each once a round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="K.")] = 7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 80,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 2026,
    engine: Annotated[str, typer.Option(help="Arguments of vllm serve as JSON; the bundled pair has its own.")] = "",
    one_server_at_a_time: Annotated[bool, typer.Option(help="Restart servers between modes: for one GPU.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against tokens/s into this PNG.")] = None,
) -> None:
    """Compare modes."""
    console = Console()
    names = [m.strip() for m in modes.split(";" if ";" in modes or "{" in modes else ",") if m.strip()]
    drafter = {"model": draft, "num_speculative_tokens": num_speculative_tokens}
    is_bundled = target == str(bundled("target"))
    try:
        options = json.loads(engine) if engine else (BUNDLED_ARGUMENTS if is_bundled else {})
    except ValueError as error:
        raise ConfigError(f"--engine: not valid JSON ({error})") from None
    configs = {name: speculative_config(name, drafter, arbiter) for name in names}
    scorer, problems = load_problems(task, dataset, num_prompts, seed)
    tallies = {name: results.Tally() for name in names}
    load_options = (max_tokens, temperature, max_concurrency)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    failure: Exception | KeyboardInterrupt | None = None
    with (
        tempfile.TemporaryDirectory(prefix="cospec-throughput-") as scratch,
        interruptible(),
        contextlib.ExitStack() as alive,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("starting", total=rounds * len(names))

        def start(name: str, stack: contextlib.ExitStack) -> Server:
            log = Path(scratch) / f"{names.index(name)}.log"
            server = stack.enter_context(Server(target, configs[name], arguments(options), log=log))
            server.wait_until_ready()
            asyncio.run(load.ask(server.url, NAME, [p.prompt for p in problems[:max_concurrency]], *load_options))
            return server

        try:
            servers = {} if one_server_at_a_time else {name: start(name, alive) for name in names}
            for number in range(rounds):
                shift = number % len(names)
                for name in names[shift:] + names[:shift]:
                    progress.update(bar, description=f"round {number + 1}: {name[:30]}")
                    with contextlib.ExitStack() as brief:
                        server = servers.get(name) or start(name, brief)
                        run_mode(server, tallies[name], problems, scorer, load_options)
                    progress.advance(bar)
        except (ServerError, openai.OpenAIError, OSError, KeyboardInterrupt) as error:
            failure = error
    rows = results.rows(tallies)
    if rows:
        title = f"{num_prompts} problems, {max_concurrency} at a time, up to {rounds} rounds"
        console.print(results.table(rows, title))
        for line in results.ratios(tallies):
            console.print(line)
        if json_path is not None:
            document = {
                "schema": 1, "environment": results.environment(), "command": command_line(),
                "complete": failure is None, "modes": rows,
            }  # fmt: skip
            write_atomically(json_path, json.dumps(document, indent=2) + "\n")
        if plot is not None:
            plots.speed_and_quality(plot, rows)
    if failure is not None:
        what = "interrupted" if isinstance(failure, KeyboardInterrupt) else str(failure) or type(failure).__name__
        raise ServerError(f"{what}; {'partial results are above' if rows else 'no round was finished'}") from None


def run() -> None:
    """Run the command; what a user got wrong is one line, not a traceback."""
    try:
        typer.run(main)
    except (CoSpecError, ServerError) as error:
        Console(stderr=True).print(f"throughput: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
