"""``cospec demo``: the bundled pair on a real server, asked held-out problems over HTTP, strict and arbitrated."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_cospec.server import Server, interruptible
from vllm_cospec.training.measure.intervals import wilson_interval
from vllm_cospec.training.tasks import Problem, load_task

MODEL_NAME = "demo"
MAX_TOKENS = 80
CONCURRENCY = 16
ROUNDS = 4  # strict and arbitrated take turns, so that a noisy machine hits both alike
SEED = 20_261_122
SERVER_ARGUMENTS = (
    "--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "32",
    "--enforce-eager", "--kv-cache-memory-bytes", str(256 * 2**20),
)  # fmt: skip


@dataclass
class Tally:
    """What one mode has done so far."""

    correct: float = 0
    asked: int = 0
    output_tokens: int = 0
    seconds: float = 0
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def acceptance_length(self) -> float:
        """Tokens per target step: 1 + accepted / steps, over the whole set."""
        steps = self.counters.get("vllm:spec_decode_num_drafts", 0)
        return 1 + self.counters.get("vllm:spec_decode_num_accepted_tokens", 0) / steps if steps else float("nan")

    def row(self, mode: str) -> dict[str, Any]:
        """Return the figures of this mode for the table and for JSON."""
        return {
            "mode": mode,
            "accuracy": self.correct / max(1, self.asked),
            "accuracy_ci95": wilson_interval(self.correct, self.asked),
            "num_problems": self.asked,
            "acceptance_length": self.acceptance_length,
            "num_mismatches": int(self.counters.get("vllm:cospec_num_mismatches", 0)),
            "num_overrides": int(self.counters.get("vllm:cospec_num_overrides", 0)),
            "tokens_per_s": self.output_tokens / self.seconds if self.seconds else float("nan"),
        }


async def ask(url: str, problems: list[Problem], arguments: dict[str, Any]) -> list[tuple[str, int]]:
    """Ask a server for every problem, ``CONCURRENCY`` at a time; returns (text, output tokens) in order."""
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

        async def one(problem: Problem) -> tuple[str, int]:
            async with gate:
                answer = await client.completions.create(
                    model=MODEL_NAME, prompt=problem.prompt, max_tokens=MAX_TOKENS, temperature=0, extra_body=arguments
                )
                return answer.choices[0].text, answer.usage.completion_tokens if answer.usage else 0

        return await asyncio.gather(*(one(problem) for problem in problems))


def run_demo(num_problems: int, json_path: Path | None, console: Console) -> list[dict[str, Any]]:
    """Start the server, compare the two modes on held-out problems, stop the server; returns a row per mode."""
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)  # minutes later would be too late
    task = load_task("demo")
    problems = task.problems(seed=SEED, n=num_problems)
    modes: dict[str, dict[str, Any]] = {"strict": {"vllm_xargs": {"cospec_policy": "strict"}}, "arbitration": {}}
    tallies = {mode: Tally() for mode in modes}
    with (
        interruptible(),
        tempfile.TemporaryDirectory(prefix="vllm-cospec-demo-") as scratch,
        as_file(files("vllm_cospec.demo")) as pair,
        Server(pair / "target", {"method": "cospec"}, SERVER_ARGUMENTS, log=Path(scratch) / "server.log") as server,
    ):
        console.print(f'vllm serve {pair / "target"} --speculative-config \'{{"method":"cospec"}}\'', soft_wrap=True)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task("starting the server")
            server.wait_until_ready()
        for line in (Path(scratch) / "server.log").read_text(errors="replace").splitlines():
            if "CoSpec verification is LOSSY" in line:
                console.print(line[line.index("CoSpec") :], style="yellow", soft_wrap=True)
                break
        asyncio.run(ask(server.url, problems[:CONCURRENCY], {}))  # warm-up, not counted
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()  # type: ignore[assignment]
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("asking", total=len(problems) * len(modes))
            for first in range(ROUNDS):
                for mode, arguments in modes.items():
                    chunk = problems[first::ROUNDS]
                    before, start = server.counters(), time.perf_counter()
                    answers = asyncio.run(ask(server.url, chunk, arguments))
                    tally = tallies[mode]
                    tally.seconds += time.perf_counter() - start
                    for name, value in server.counters().items():
                        tally.counters[name] = tally.counters.get(name, 0) + value - before.get(name, 0)
                    tally.asked += len(chunk)
                    tally.output_tokens += sum(tokens for _, tokens in answers)
                    tally.correct += sum(task.score(p, text) for p, (text, _) in zip(chunk, answers, strict=True))
                    progress.advance(bar, len(chunk))
    rows = [tally.row(mode) for mode, tally in tallies.items()]
    console.print(comparison(rows))
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def comparison(rows: list[dict[str, Any]]) -> Table:
    """Return the table of the two modes."""
    n = rows[0]["num_problems"]
    table = Table(title=f"{n} held-out problems, greedy, {CONCURRENCY} at a time")
    for heading in ("mode", "accuracy (95 %)", "acceptance length", "mismatches", "overrides", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for row in rows:
        low, high = row["accuracy_ci95"]
        table.add_row(
            row["mode"],
            f"{100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            f"{row['acceptance_length']:.2f}",
            str(row["num_mismatches"]),
            str(row["num_overrides"]),
            f"{row['tokens_per_s']:.0f}",
        )
    return table


def serve_demo(port: int) -> int:
    """Serve the bundled pair on ``port`` until it is stopped; returns the server's exit code."""
    with (
        interruptible(),
        as_file(files("vllm_cospec.demo")) as pair,
        Server(pair / "target", {"method": "cospec"}, SERVER_ARGUMENTS, port=port) as server,
    ):
        return server.wait()
