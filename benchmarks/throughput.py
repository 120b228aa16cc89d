"""Speed and quality side by side: every mode answers the same problems on a real server under the same load.

Modes take turns in rounds, in an order that changes from round to round, so that a noisy machine hits them alike.
``target`` is the target without speculation, ``standard`` stock strict speculative decoding, everything else a policy.

Pair, engine settings and task come from a training configuration, by default that of the bundled pair; what is given
explicitly wins, and with a target of one's own nothing comes from the bundled pair.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --config training/configs/smollm2.toml --arbiter benchmarks/smollm2/arbiter
    python benchmarks/throughput.py --target Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --arbiter DIR --dataset gsm8k.jsonl
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import load
import openai
import plots
import results
import typer
from console import wide_console
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_cospec.arbiter import load_artefact
from vllm_cospec.errors import ConfigError, CoSpecError, ServerError, first_sentence
from vllm_cospec.kernels.policies import policy_names
from vllm_cospec.recipe import locate_artefact
from vllm_cospec.server import Server, interruptible
from vllm_cospec.training.commands import DEMO_CONFIG
from vllm_cospec.training.config import PairConfig, bundled, load_train_config, locate, require_models
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.tasks import Problem, Task, load_task, task_names

NAME = "model"
WARM_UP = 16  # requests before the first round
BUNDLED_ARBITER = bundled("target").parent / "arbiter"


@dataclass(frozen=True)
class Setup:
    """What is asked of whom."""

    pair: PairConfig
    task: Task
    problems: list[Problem]
    max_tokens: int


def speculative_config(mode: str, pair: PairConfig, arbiter: str) -> dict[str, Any] | None:
    """Return what ``--speculative-config`` is for a mode; None for no speculation.

    Args:
        mode: target, standard, a policy's name, or a policy as JSON.
        pair: the models and K.
        arbiter: directory or hub id for ``learned``.

    Raises:
        ConfigError: no such mode, or no such arbiter.
        ArtefactError: the arbiter is damaged.
    """
    if mode == "target":
        return None
    if mode == "standard":
        return pair.speculative_config(None)
    if mode == "learned":
        load_artefact(locate_artefact(arbiter))  # a missing or damaged one is refused before servers start
        return pair.speculative_config(arbiter)
    try:
        policy = json.loads(mode) if mode.startswith("{") else {"policy": mode}
    except ValueError as error:
        raise ConfigError(f"--modes: {mode!r} is not valid JSON ({error})") from None
    if policy.get("policy") not in policy_names():
        raise ConfigError(
            f"--modes: unknown mode {mode!r}; known are target, standard, {', '.join(policy_names())}, or a policy as "
            f'JSON: {{"policy": "cascade", "alpha": 0.95}}'
        )
    return pair.speculative_config(policy)


def set_up(
    config: Path | None, pair_options: dict[str, Any], task_name: str | None, dataset: Path | None, count: int,
    seed: int, max_tokens: int | None,
) -> Setup:  # fmt: skip
    """Combine a configuration with what was given explicitly.

    Args:
        config: training configuration; None for the bundled pair's, or for none when a target is given.
        pair_options: fields of the pair given explicitly; None stands for not given.
        task_name: a task, or a reasoning-gym generator.
        dataset: JSONL of problems instead.
        count, seed: of the problems.
        max_tokens: longest answer.

    Raises:
        ConfigError: something is missing or does not fit.
    """
    here = Path.cwd() / "options"  # paths are relative to the working directory
    given = {name: locate(value, here) for name, value in pair_options.items() if value is not None}
    run = load_train_config(config or DEMO_CONFIG) if config or "target" not in given else None
    try:
        pair = PairConfig.model_validate({**(run.pair.model_dump() if run else {"num_speculative_tokens": 5}), **given})
    except ValidationError as error:
        raise ConfigError(first_sentence(error, "--target, --draft")) from None
    require_models(pair)
    if dataset is not None:
        task = load_task("jsonl", path=str(dataset), test_path=str(dataset))
    elif task_name is not None and task_name not in task_names():
        task = load_task("reasoning_gym", generator=task_name)
    elif task_name is not None or run is None:
        task = load_task(task_name or "demo")
    else:
        task = load_task(run.task.name, **run.task.options)
    return Setup(pair, task, task.problems(seed, count, "test"), max_tokens or (run.rollout.max_tokens if run else 512))


def arguments(options: dict[str, Any]) -> tuple[str, ...]:
    """Turn arguments of vLLM's ``LLM`` into those of ``vllm serve``."""
    flags: list[str] = ["--served-model-name", NAME]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
    return tuple(flags)


def run_mode(server: Server, tally: results.Tally, problems: dict[int, Problem], task: Task, load_options: Any) -> None:
    """Ask one server for every problem once and add what it did to the tally."""
    before, began = server.counters(), time.perf_counter()
    replies = asyncio.run(load.ask(server.url, NAME, [problem.prompt for problem in problems.values()], *load_options))
    seconds, after = time.perf_counter() - began, server.counters()
    answered = zip(problems.items(), replies, strict=True)
    scores = {number: task.score(problem, reply.text) for (number, problem), reply in answered}
    tally.add(replies, scores, seconds, {name: value - before.get(name, 0.0) for name, value in after.items()})


def share(problems: list[Problem], number: int, parts: int) -> dict[int, Problem]:
    """Return one part of the problems, by their place among all: every ``parts``-th of them."""
    return {index: problem for index, problem in enumerate(problems) if index % parts == number % parts}


def run_rounds(
    setup: Setup, configs: dict[str, dict[str, Any] | None], tallies: dict[str, results.Tally], rounds: int,
    load_options: Any, partition: bool, one_server_at_a_time: bool,
) -> Iterator[int]:  # fmt: skip
    """Start the servers, let every mode answer the problems in turns, yield the number of each finished round.

    With ``partition`` a round has its share of the problems, else all of them.

    Raises:
        ServerError, openai.OpenAIError, OSError: a server did not come up or is gone.
    """
    names = list(configs)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="cospec-throughput-") as scratch,
        interruptible(),
        contextlib.ExitStack() as alive,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("starting", total=rounds * len(names))

        def start(name: str, stack: contextlib.ExitStack) -> Server:
            log = Path(scratch) / f"{names.index(name)}.log"
            server = Server(setup.pair.target, configs[name], arguments(setup.pair.engine), log=log)
            stack.enter_context(server)
            server.wait_until_ready()
            first = [problem.prompt for problem in setup.problems[:WARM_UP]]
            asyncio.run(load.ask(server.url, NAME, first, *load_options))
            return server

        servers = {} if one_server_at_a_time else {name: start(name, alive) for name in names}
        for number in range(rounds):
            shift = number % len(names)
            asked = share(setup.problems, number, rounds if partition else 1)
            for name in names[shift:] + names[:shift]:
                progress.update(bar, description=f"round {number + 1}: {name[:30]}")
                with contextlib.ExitStack() as brief:
                    server = servers.get(name) or start(name, brief)
                    run_mode(server, tallies[name], asked, setup.task, load_options)
                progress.advance(bar)
            yield number


def main(
    config: Annotated[Path | None, typer.Option(help="Training configuration of pair and task.")] = None,
    target: Annotated[str | None, typer.Option(help="Target: directory or hub id.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft: directory or hub id.")] = None,
    arbiter: Annotated[str, typer.Option(help="Trained arbiter, for learned.")] = str(BUNDLED_ARBITER),
    modes: Annotated[str, typer.Option(help="Modes, separated by semicolons or commas.")] = "target,standard,learned",
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
    """Compare modes."""
    console = wide_console()
    names = [m.strip() for m in modes.split(";" if ";" in modes or "{" in modes else ",") if m.strip()]
    try:
        options = json.loads(engine) if engine else None
    except ValueError as error:
        raise ConfigError(f"--engine: not valid JSON ({error})") from None
    given = {"target": target, "draft": draft, "num_speculative_tokens": num_speculative_tokens, "engine": options}
    if partition and num_prompts < rounds:
        raise ConfigError(f"--partition: {num_prompts} problems are too few for {rounds} rounds; raise --num-prompts")
    setup = set_up(config, given, task, dataset, num_prompts, seed, max_tokens)
    configs = {name: speculative_config(name, setup.pair, arbiter) for name in names}
    tallies = {name: results.Tally() for name in names}
    load_options = (setup.max_tokens, temperature, max_concurrency)
    failure: Exception | KeyboardInterrupt | None = None

    def publish(complete: bool, show: bool) -> None:
        """Write what there is; called after every round, so that a killed run leaves its figures."""
        rows = results.rows(tallies)
        if show and rows:
            title = f"{num_prompts} problems, {max_concurrency} at a time, {results.finished(tallies)} rounds"
            console.print(results.table(rows, title))
            for line in results.ratios(tallies):
                console.print(line)
        if rows and json_path is not None:
            document = {"schema": 1, "complete": complete, "modes": rows, "ratios": results.ratios(tallies)}
            write_result(json_path, document)
        if rows and plot is not None:
            plots.speed_and_quality(plot, rows)

    try:
        for _ in run_rounds(setup, configs, tallies, rounds, load_options, partition, one_server_at_a_time):
            publish(complete=False, show=False)
    except (ServerError, openai.OpenAIError, OSError, KeyboardInterrupt) as error:
        failure = error
    publish(complete=failure is None, show=True)
    if failure is not None:
        what = "interrupted" if isinstance(failure, KeyboardInterrupt) else str(failure) or type(failure).__name__
        some = any(tally.seconds for tally in tallies.values())
        raise ServerError(f"{what}; {'partial results are above' if some else 'no round was finished'}") from None


def run() -> None:
    """Run the command; what a user got wrong is one line, not a traceback."""
    try:
        typer.run(main)
    except CoSpecError as error:
        Console(stderr=True).print(f"throughput: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
