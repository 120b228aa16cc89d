"""``cospec demo``: the bundled pair on a real server, asked held-out problems over HTTP, strict and arbitrated."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vllm_cospec.atomic import write_text
from vllm_cospec.server import Server, interruptible
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.outcome import Outcome, table_of
from vllm_cospec.training.measure.render import COUNTED, rich_table
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.tasks import Problem, Task, load_task

MODEL_NAME = "demo"
MAX_TOKENS = 80
CONCURRENCY = 16
ROUNDS = 4  # strict and arbitrated take turns, so that a noisy machine hits both alike
SEED = 20_261_122
SERVER_ARGUMENTS = (
    "--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "32",
    "--enforce-eager", "--kv-cache-memory-bytes", str(256 * 2**20),
)  # fmt: skip
MODES: dict[str, dict[str, Any]] = {"strict": {"vllm_xargs": {"cospec_policy": "strict"}}, "arbitration": {}}


async def ask(url: str, problems: list[Problem], arguments: dict[str, Any]) -> list[tuple[str, int, bool]]:
    """Ask a server for every problem, ``CONCURRENCY`` at a time; returns (text, tokens, whether cut off) in order."""
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

        async def one(problem: Problem) -> tuple[str, int, bool]:
            async with gate:
                answer = await client.completions.create(
                    model=MODEL_NAME, prompt=problem.prompt, max_tokens=MAX_TOKENS, temperature=0, extra_body=arguments
                )
                tokens = answer.usage.completion_tokens if answer.usage else 0
                return answer.choices[0].text, tokens, answer.choices[0].finish_reason == "length"

        return await asyncio.gather(*(one(problem) for problem in problems))


def ask_round(
    server: Server, task: Task, problems: list[Problem], numbers: range, arguments: dict[str, Any]
) -> Outcome:
    """Ask for the problems with these numbers and return what came of it."""
    chosen = [problems[number] for number in numbers]
    before, start = Counts.of_metrics(server.counters()), time.perf_counter()
    answers = asyncio.run(ask(server.url, chosen, arguments))
    seconds = time.perf_counter() - start
    counts = Counts.of_metrics(server.counters()) - before
    texts, tokens, capped = zip(*answers, strict=True)
    counts = counts.as_delivered(sum(tokens), len(tokens))
    scores = [task.score(problem, text) for problem, text in zip(chosen, texts, strict=True)]
    return Outcome(
        np.array(numbers), np.array(scores), np.array(tokens, np.int64), np.array(capped, bool), counts, seconds
    )


def run_demo(num_problems: int, json_path: Path | None, console: Console) -> list[dict[str, Any]]:
    """Start the server, compare the two modes on held-out problems, stop the server; returns a row per mode."""
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)  # minutes later would be too late
    task = load_task("demo")
    problems = task.problems(seed=SEED, n=num_problems)
    outcomes: dict[str, list[Outcome]] = {mode: [] for mode in MODES}
    with (
        interruptible(),
        tempfile.TemporaryDirectory(prefix="vllm-cospec-demo-") as scratch,
        as_file(files("vllm_cospec.demo")) as pair,
        Server(pair / "target", {"method": "cospec"}, SERVER_ARGUMENTS, log=Path(scratch) / "server.log") as server,
    ):
        console.print(f'vllm serve {pair / "target"} --speculative-config \'{{"method":"cospec"}}\'', soft_wrap=True)
        with progress_bar("starting the server", len(problems) * len(MODES), console) as tick:
            server.wait_until_ready()
            for line in (Path(scratch) / "server.log").read_text(errors="replace").splitlines():
                if "CoSpec verification is LOSSY" in line:
                    console.print(line[line.index("CoSpec") :], style="yellow", soft_wrap=True)
                    break
            asyncio.run(ask(server.url, problems[:CONCURRENCY], {}))  # warm-up, not counted
            tick(text="asking")
            for first in range(ROUNDS):
                for mode, arguments in MODES.items():
                    numbers = range(first, len(problems), ROUNDS)
                    outcomes[mode].append(ask_round(server, task, problems, numbers, arguments))
                    tick(len(numbers))
    rows = table_of({mode: Outcome.merge(rounds) for mode, rounds in outcomes.items()}, "strict")
    title = f"{num_problems} held-out problems, greedy, {CONCURRENCY} at a time"
    console.print(rich_table(rows, title, COUNTED))
    if json_path is not None:
        write_text(json_path, json.dumps(rows, indent=2) + "\n")
    return rows


def serve_demo(port: int) -> int:
    """Serve the bundled pair on ``port`` until it is stopped; returns the server's exit code."""
    with (
        interruptible(),
        as_file(files("vllm_cospec.demo")) as pair,
        Server(pair / "target", {"method": "cospec"}, SERVER_ARGUMENTS, port=port) as server,
    ):
        return server.wait()
