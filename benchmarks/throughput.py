"""Speed and quality side by side: every mode answers the same problems on a real server under the same load.

Modes take turns in rounds, in an order that changes from round to round, so that a noisy machine hits them alike.
``target`` is the target without speculation, ``standard`` stock strict speculative decoding, everything else a policy.

Pair, engine settings and task come from a training configuration, by default that of the bundled pair; what is given
explicitly wins, and with a target of one's own nothing comes from the bundled pair.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --modes 'target,standard,learned,cascade(alpha=0.95)'
    python benchmarks/throughput.py --config training/configs/smollm2.toml --arbiter benchmarks/smollm2/arbiter
    python benchmarks/throughput.py --target Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --arbiter DIR --dataset gsm8k.jsonl
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import openai
import typer

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rounds as results
from benchmarks.command import run, wide_console
from benchmarks.load import Load, ask
from benchmarks.setup import NAME, Setup, served, server_arguments, set_up
from vllm_cospec.errors import ConfigError, CoSpecError, ServerError
from vllm_cospec.server import Server, interruptible
from vllm_cospec.training.config import bundled
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.modes import parse_mode, split_modes
from vllm_cospec.training.measure.outcome import Outcome
from vllm_cospec.training.measure.plots import SPEED as SPEED_AXIS
from vllm_cospec.training.measure.plots import plot_accuracy
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.measure.render import SPEED, rich_table
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.tasks.grading import FailureWatch, Graders

WARM_UP, WARM_UP_TOKENS = 16, 8  # requests before the first round, and how long their answers are
BUNDLED_ARBITER = bundled("target").parent / "arbiter"

Served = tuple[str, dict[str, Any] | None]  # model, speculative configuration


def ask_round(server: Server, numbers: Sequence[int], setup: Setup, graders: Graders, load: Load) -> Outcome:
    """Ask one server for the problems of these numbers once; returns what came of it."""
    before, began = Counts.of_metrics(server.counters()), time.perf_counter()
    replies = asyncio.run(ask(server.url, NAME, [setup.prompts[number] for number in numbers], load))
    seconds, counts = time.perf_counter() - began, Counts.of_metrics(server.counters()) - before
    grades = graders.grade([setup.problems[number] for number in numbers], [reply.text for reply in replies])
    tokens = np.array([reply.output_tokens for reply in replies], np.int64)
    return Outcome(
        np.array(numbers),
        np.array([grade.score for grade in grades], np.float64),
        tokens,
        np.array([reply.capped for reply in replies], bool),
        counts.as_delivered(int(tokens.sum()), len(tokens)),
        seconds,
        [reply.arrivals for reply in replies],
        [grade.failure for grade in grades if grade.failure],
    )


def share(count: int, number: int, parts: int) -> range:
    """Return the numbers of one part of the problems: every ``parts``-th of them."""
    return range(number % parts, count, parts)


def require_shares(partition: bool, num_prompts: int, rounds: int) -> None:
    """Refuse fewer problems than rounds that are to share them.

    Raises:
        ConfigError: there are fewer.
    """
    if partition and num_prompts < rounds:
        raise ConfigError(f"--partition: {num_prompts} problems are too few for {rounds} rounds; raise --num-prompts")


def warm_up_prompts(setup: Setup) -> list[list[int]]:
    """Return what a server is asked before the first round: prompts backwards, so that no prefix is cached by them."""
    return [prompt[::-1] for prompt in setup.prompts[:WARM_UP]]


def warm_up_load(loads: Sequence[Load]) -> Load:
    """Return how it is asked: a few tokens each, as many at a time as will come."""
    most = max(load.max_concurrency for load in loads)
    return replace(loads[0], max_tokens=min(WARM_UP_TOKENS, loads[0].max_tokens), max_concurrency=most)


def run_rounds(
    setup: Setup, modes: dict[str, Served], outcomes: Sequence[dict[str, list[Outcome]]], rounds: int,
    loads: Sequence[Load], partition: bool, one_server_at_a_time: bool,
) -> Iterator[int]:  # fmt: skip
    """Start the servers, let every mode answer the problems in turns, yield the number of each finished round.

    With ``partition`` every load of a round has its share of the problems, else each has all of them.

    Args:
        setup: what is asked of whom.
        modes: what is served, by name.
        outcomes: for each load, what came of it, by mode; filled here.
        rounds: how many.
        loads: asked one after another within a round, each of every mode.
        partition: see above.
        one_server_at_a_time: a server is started whenever its turn comes.

    Raises:
        ServerError, openai.OpenAIError, OSError: a server did not come up or is gone.
    """
    names = list(modes)
    watch = FailureWatch(setup.task.max_failed_rewards)
    with (
        Graders(setup.task) as graders,
        tempfile.TemporaryDirectory(prefix="cospec-throughput-") as scratch,
        interruptible(),
        contextlib.ExitStack() as alive,
        progress_bar("starting", rounds * len(loads) * len(names)) as tick,
    ):

        def start(name: str, stack: contextlib.ExitStack) -> Server:
            model, speculative = modes[name]
            log = Path(scratch) / f"{names.index(name)}.log"
            server = Server(model, speculative, server_arguments(setup.pair.engine), log=log)
            stack.enter_context(server)
            server.wait_until_ready()
            asyncio.run(ask(server.url, NAME, warm_up_prompts(setup), warm_up_load(loads)))
            return server

        servers = {} if one_server_at_a_time else {name: start(name, alive) for name in names}
        for number, (place, load) in itertools.product(range(rounds), enumerate(loads)):
            shift, part = number % len(names), number * len(loads) + place
            asked = share(len(setup.problems), part, rounds * len(loads)) if partition else range(len(setup.problems))
            for name in names[shift:] + names[:shift]:
                tick(text=f"round {number + 1}: {name[:30]}")
                with contextlib.ExitStack() as brief:
                    server = servers.get(name) or start(name, brief)
                    outcome = ask_round(server, asked, setup, graders, load)
                watch.add(len(asked), outcome.failures)
                outcomes[place][name].append(outcome)
                tick(1)
            if place == len(loads) - 1:
                yield number


def main(
    config: Annotated[Path | None, typer.Option(help="Training configuration of pair and task.")] = None,
    target: Annotated[str | None, typer.Option(help="Target: directory or hub id.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft: directory or hub id.")] = None,
    arbiter: Annotated[str, typer.Option(help="Trained arbiter, for learned.")] = str(BUNDLED_ARBITER),
    modes: Annotated[str, typer.Option(help="Modes, separated by commas or semicolons.")] = "target,standard,learned",
    task: Annotated[str | None, typer.Option(help="A task, or a reasoning-gym generator.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="JSONL of problems instead; GSM8K's format too.")] = None,
    num_prompts: Annotated[int, typer.Option(min=2, help="Problems; every mode answers each once a round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    partition: Annotated[
        bool, typer.Option("--partition", help="Each round asks its own share of the problems.")
    ] = False,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    num_speculative_tokens: Annotated[int | None, typer.Option(min=1, help="K.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 2026,
    engine: Annotated[str | None, typer.Option(help="Arguments of vLLM's LLM as JSON, instead of the file's.")] = None,
    one_server_at_a_time: Annotated[bool, typer.Option(help="Restart servers between modes: for one GPU.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against tokens/s into this PNG.")] = None,
) -> None:
    """Compare modes: speed and quality, interleaved in rounds."""
    console = wide_console()
    try:
        options = json.loads(engine) if engine else None
    except ValueError as error:
        raise ConfigError(f"--engine: not valid JSON ({error})") from None
    given = {"target": target, "draft": draft, "num_speculative_tokens": num_speculative_tokens, "engine": options}
    require_shares(partition, num_prompts, rounds)
    parsed = [parse_mode(text, where="--modes") for text in split_modes(modes)]
    if not parsed:
        raise ConfigError("--modes: names no mode; write for example target,standard,learned")
    setup = set_up(config, given, task, dataset, num_prompts, seed, max_tokens)
    servers = {mode.name: served(mode, setup.pair, arbiter) for mode in parsed}
    outcomes: dict[str, list[Outcome]] = {mode.name: [] for mode in parsed}
    failure: Exception | KeyboardInterrupt | None = None

    def publish(complete: bool, show: bool) -> None:
        """Write what there is; called after every round, so that a killed run leaves its figures."""
        rows, ratios = results.rows(outcomes), results.ratios(outcomes)
        if show and rows:
            title = f"{num_prompts} problems, {max_concurrency} at a time, {results.finished(outcomes)} rounds"
            console.print(rich_table(rows, title, SPEED))
            for line in ratios:
                console.print(line)
        if rows and json_path is not None:
            write_result(json_path, {"schema": 1, "complete": complete, "modes": rows, "ratios": ratios})
        if rows and plot is not None:
            plot_accuracy(plot, {row["mode"]: [row] for row in rows}, SPEED_AXIS)

    load = Load(setup.max_tokens, temperature, max_concurrency, setup.max_model_len)
    try:
        for _ in run_rounds(setup, servers, [outcomes], rounds, [load], partition, one_server_at_a_time):
            publish(complete=False, show=False)
    except (CoSpecError, openai.OpenAIError, OSError, KeyboardInterrupt) as error:
        failure = error
    publish(complete=failure is None, show=True)
    if failure is not None:
        what = "interrupted" if isinstance(failure, KeyboardInterrupt) else str(failure) or type(failure).__name__
        some = any(outcomes.values())
        raise ServerError(f"{what}; {'partial results are above' if some else 'no round was finished'}") from None


if __name__ == "__main__":
    run(main)
