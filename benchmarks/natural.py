"""The code pair, answer by answer: every mode asked the same lines, kept so that a run can be stopped and go on.

All modes of some lines are asked one after another, so that a prompt is computed once. What is kept of an answer names
its line by file and number and holds no text of the code base.

    python -m benchmarks.natural answers --work runs/natural/calibration --split calibration --seed 77 --rules
    python -m benchmarks.natural report --calibration runs/natural/calibration --test runs/natural/test --json FILE
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from benchmarks.command import run as run_command
from benchmarks.command import several, wide_console
from benchmarks.pareto import families, grid
from benchmarks.resumed import drop_cut_line, require_alike
from vllm_cospec.arbiter import load_artefact
from vllm_cospec.atomic import write_text
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.training.artefact import portable
from vllm_cospec.training.config import PairConfig, TrainConfig, load_train_config
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.evaluate import prepare
from vllm_cospec.training.measure.intervals import resampled_quotient
from vllm_cospec.training.measure.modes import Mode, parse_mode
from vllm_cospec.training.measure.outcome import Outcome, compare, table_of
from vllm_cospec.training.measure.plots import plot_accuracy
from vllm_cospec.training.measure.provenance import environment, write_result
from vllm_cospec.training.measure.render import rich_table
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.tasks import Problem, Split, digest, load_task
from vllm_cospec.training.tasks.code_lines import first_line, learnt_lines, similarity

CONFIG = Path("training/configs/code.toml")
ABOUT, ANSWERS = "about.json", "answers.jsonl"
CHUNK = 100  # lines whose prompts stay cached while every mode answers them, by default
BASELINE = "strict"  # emits the target's tokens
RESAMPLES = 2000  # of lines, for an interval

app = several(__doc__)


@dataclass(frozen=True)
class Contestant:
    """A mode, and the arbiter it asks where it is a learned one."""

    name: str  # "NAME: mode" for an arbiter that was given a name
    mode: Mode
    arbiter: Path | None

    @property
    def engine(self) -> str:
        """Which engine answers: target, draft, or the pair."""
        return self.mode.kind if self.mode.kind in ("target", "draft") else "pair"


def contestants(modes: Sequence[str], arbiters: dict[str, Path]) -> list[Contestant]:
    """Read modes such as ``cascade(alpha=0.9)`` and ``NAME: learned(threshold=0.3)``.

    Raises:
        ConfigError: a mode is none, or no arbiter has that name.
    """
    found = []
    for text in dict.fromkeys(modes):
        name, colon, rest = text.rpartition(": ")
        mode = parse_mode(rest)
        arbiter = None
        if mode.kind == "learned":
            if name not in arbiters:
                raise ConfigError(f"--mode: {text!r}: no arbiter is called {name!r}; pass --arbiter {name}=DIRECTORY")
            arbiter = arbiters[name]
        elif colon:
            raise ConfigError(f"--mode: {text!r}: only learned takes an arbiter's name")
        found.append(Contestant(text, mode, arbiter))
    return found


def entry(name: str, number: int, problem: Problem, response: Any) -> dict[str, Any]:
    """Return what is kept of an answer."""
    place = problem.metadata
    line = first_line(response.text)
    return {
        "mode": name,
        "problem": number,
        "path": place.path,  # the prompt: these lines, from the first to the cut, a column of the last
        "first": place.line - problem.prompt.count("\n"),
        "line": place.line,
        "cut": len(problem.prompt.rpartition("\n")[2]),
        "new": place.text not in learnt_lines(),
        "right": line == problem.answer,
        "similarity": round(similarity(problem.answer, line), 4),
        "answer_sha256": hashlib.sha256(line.encode()).hexdigest()[:16],
        "tokens": len(response.tokens),
        "steps": len(response.emitted),
        "capped": response.capped,
        "mismatches": len(response.decisions),
        "overrides_at": [decision.output_position for decision in response.decisions if decision.kept],
    }


def ask(
    engine: Any, contestant: Contestant, prompts: Sequence[list[int]], most: int, temperature: float,
    seeds: Sequence[int] | None = None,
) -> list[Any]:  # fmt: skip
    """Ask a contestant; returns a response for each prompt.

    Args:
        engine: of the contestant's kind.
        contestant: whose mode and arbiter the engine is set to.
        prompts: token ids.
        most: tokens of an answer.
        temperature: 0 is greedy.
        seeds: of each; their numbers if left out.
    """
    from vllm_cospec.training.rollout.engine import Request

    extra = prepare(engine, contestant.mode)
    if contestant.arbiter is not None:
        engine.set_policy(Learned(artefact=str(contestant.arbiter)))
        engine.set_arbiter(load_artefact(contestant.arbiter)[0].state_dict(), False)
    return engine.run(
        [
            Request(prompt, min(most, engine.max_model_len - len(prompt)), seed, temperature, extra)
            for prompt, seed in zip(prompts, seeds or range(len(prompts)), strict=True)
        ]
    )


class Answering:
    """Asks contestants, one engine after another, and appends what they answer."""

    def __init__(
        self, config: TrainConfig, work: Path, problems: Sequence[Problem], temperature: float, together: int = CHUNK
    ):
        """Args:
        config: the pair, the task, the longest answer.
        work: where answers are kept.
        problems: the lines.
        temperature: of every contestant; 0 is greedy.
        together: lines that are asked at once.
        """
        self._together = together
        self._config, self._path, self._problems = config, work / ANSWERS, problems
        self._temperature = temperature
        drop_cut_line(self._path)
        self.done = {(row["mode"], row["problem"]) for row in read_answers(work)} if self._path.exists() else set()

    def left(self, contestant: Contestant) -> int:
        """Return how many lines a contestant has not answered."""
        return sum((contestant.name, number) not in self.done for number in range(len(self._problems)))

    def ask(self, engine: Any, wanted: Sequence[Contestant]) -> Iterator[tuple[str, int]]:
        """Ask; yields the name of a contestant and how many lines it has answered."""
        for first in range(0, len(self._problems), self._together):
            engine.start_afresh()
            numbers = range(first, min(first + self._together, len(self._problems)))
            for contestant in wanted:
                open_ = [number for number in numbers if (contestant.name, number) not in self.done]
                if open_:
                    self._answer(engine, contestant, open_)
                yield contestant.name, len(open_)

    def _answer(self, engine: Any, contestant: Contestant, numbers: Sequence[int]) -> None:
        prompts = [engine.encode(self._problems[number].prompt) for number in numbers]
        most = self._config.rollout.max_tokens
        responses = ask(engine, contestant, prompts, most, self._temperature, numbers)
        lines = [
            json.dumps(entry(contestant.name, number, self._problems[number], response))
            for number, response in zip(numbers, responses, strict=True)
        ]
        with self._path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))


def read_answers(work: Path) -> list[dict[str, Any]]:
    """Return the answers of a directory; a last line that a kill cut off is left out."""
    rows = []
    for line in (work / ANSWERS).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def build_engine(pair: PairConfig, asked: Sequence[Contestant]) -> Any:
    """Start the engine of contestants of one kind: of the target, the draft, or the pair with an arbiter if one has."""
    from vllm_cospec.training.rollout.engine import Engine

    kind = asked[0].engine
    if kind != "pair":
        return Engine(pair, None, role=kind)
    arbiter = next((one.arbiter for one in asked if one.arbiter is not None), None)
    if arbiter is None:
        return Engine(pair, {"policy": "strict"})
    return Engine(pair, {"policy": "learned", "artefact": str(arbiter)})


def named_arbiters(texts: Sequence[str] | None) -> dict[str, Path]:
    """Read NAME=DIRECTORY.

    Raises:
        ConfigError: something else was written.
    """
    found = {}
    for text in texts or ():
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--arbiter: {text!r} names no directory; write NAME=DIRECTORY")
        found[name] = Path(directory)
    return found


@app.command()
def answers(
    work: Annotated[Path, typer.Option(help="Directory for the answers; what is there is kept.")],
    config: Annotated[Path, typer.Option(help="TOML file of the pair and the task.")] = CONFIG,
    split: Annotated[str, typer.Option(help="calibration or test.")] = "calibration",
    problems: Annotated[int, typer.Option(min=1, help="How many lines.")] = 500,
    seed: Annotated[int, typer.Option(help="Which of the split's lines.")] = 77,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many of them, which were asked before.")] = 0,
    together: Annotated[int, typer.Option(min=1, help="Lines that are asked at once; a GPU takes more.")] = CHUNK,
    mode: Annotated[
        list[str] | None, typer.Option(help="A mode to ask; NAME: learned(...) for a named arbiter.")
    ] = None,
    arbiter: Annotated[list[str] | None, typer.Option(help="NAME=DIRECTORY of a trained arbiter.")] = None,
    package: Annotated[str | None, typer.Option(help="Another installed package whose lines are asked for.")] = None,
    half: Annotated[str | None, typer.Option(help="first or second: of the package's directories alone.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="Ask every rule over its grid as well.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
) -> None:
    """Ask modes the same lines, and keep what they answer."""
    run = load_train_config(config)
    places = {key: value for key, value in (("package", package), ("half", half)) if value is not None}
    task = run.task.model_copy(update={"options": run.task.options | places})
    run = run.model_copy(update={"task": task})
    settings = itertools.chain.from_iterable(grid(run.pair.num_speculative_tokens).values()) if rules else ()
    wanted = contestants([*(mode or [BASELINE]), *settings], named_arbiters(arbiter))
    drawn = load_task(run.task.name, **run.task.options).problems(seed, skip + problems, cast(Split, split))[skip:]
    dumped = portable(run)
    about = {
        "split": split, "seed": seed, "num_problems": problems, "problems_sha256": digest(drawn),
        "temperature": temperature, "pair": dumped["pair"], "task": dumped["task"],
        **({"skipped": skip} if skip else {}),
    }  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    if (work / ABOUT).exists():
        found = json.loads((work / ABOUT).read_text())
        require_alike(found, about, f"--work: {work} holds answers with another", "directory")
    else:
        write_text(work / ABOUT, json.dumps({**about, "environment": environment()}, indent=1) + "\n")
    answering = Answering(run, work, drawn, temperature, together)
    wanted = [one for one in wanted if answering.left(one)]
    with progress_bar("answering", sum(answering.left(one) for one in wanted)) as tick:
        for kind in dict.fromkeys(one.engine for one in wanted):
            own = [one for one in wanted if one.engine == kind]
            engine = build_engine(run.pair, own)
            for name, count in answering.ask(engine, own):
                tick(count, name)
            del engine


def outcomes(work: Path) -> tuple[dict[str, Outcome], dict[str, list[dict[str, Any]]]]:
    """Return outcomes and answers by mode, of the modes that have answered every line.

    An acceptance length is delivered tokens per target step, the prompt's own step and its token aside.
    """
    about = json.loads((work / ABOUT).read_text())
    by_mode: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_answers(work):
        by_mode.setdefault(row["mode"], {})[row["problem"]] = row
    found, kept = {}, {}
    for mode, unordered in by_mode.items():
        if len(unordered) < about["num_problems"]:
            continue
        rows = [unordered[number] for number in sorted(unordered)]
        tokens, steps = (np.array([row[key] for row in rows], np.int64) for key in ("tokens", "steps"))
        found[mode] = Outcome(
            np.array([row["problem"] for row in rows]),
            np.array([float(row["right"]) for row in rows]),
            tokens,
            np.array([row["capped"] for row in rows], bool),
            Counts.of_responses(
                tokens, steps, sum(row["mismatches"] for row in rows), sum(len(row["overrides_at"]) for row in rows)
            ),
            0.0,
        )
        kept[mode] = rows
    return found, kept


def rows_of(work: Path) -> dict[str, dict[str, Any]]:
    """Return a row of figures for each mode that has answered every line, paired with strict."""
    found, kept = outcomes(work)
    rows = {row["mode"]: row for row in table_of(found, BASELINE)}
    for mode, row in rows.items():
        new = [entry["right"] for entry in kept[mode] if entry["new"]]
        row["edit_similarity"] = float(np.mean([entry["similarity"] for entry in kept[mode]]))
        row["accuracy_new_lines"], row["num_new_lines"] = float(np.mean(new)) if new else 0.0, len(new)
        for key in ("tokens_per_s", "requests_per_s", "ttft_ms_p50", "tpot_ms_p50", "itl_ms_p99"):
            del row[key]  # nothing was timed: modes share their prompts here
    return rows


def tuned(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the setting of each rule that was right most often, the longer acceptance length where two were alike."""
    rules = {name: row for name, row in rows.items() if name not in ("target", "draft", BASELINE)}
    grouped = {family: own for family, own in families(rules).items() if "learned" not in family and family != "random"}
    return {
        family: max(own, key=lambda row: (row["accuracy"], row["acceptance_length"]))["mode"]
        for family, own in grouped.items()
    }


def against(test: dict[str, Outcome], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compare each of some modes with each of some others, paired."""
    return {
        f"{one} - {other}": compare(test[one], test[other])
        for one in ours
        for other in theirs
        if one in test and other in test and one != other
    }


def times_strict(kept: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return of each mode how many times strict's acceptance length it has, with a 95 % interval: lines resampled."""
    if BASELINE not in kept:
        return {}
    behind = {
        mode: np.array([[row["tokens"] - 1, row["steps"] - 1] for row in rows], float) for mode, rows in kept.items()
    }
    found = {}
    for mode, own in behind.items():
        if mode not in (BASELINE, "target", "draft"):
            times, interval = resampled_quotient(own, behind[BASELINE], RESAMPLES)
            found[mode] = {"times_strict": times, "ci95": interval}
    return found


@app.command()
def report(
    calibration: Annotated[
        Path | None, typer.Option(help="Answers to calibration lines; left out: modes are compared as they were asked.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Answers to test lines; left out: nothing is said of them.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, a plot beside it.")] = None,
) -> None:
    """Show both, rules as tuned on the calibration lines, and compare on the test lines, or else on the others."""
    where = test or calibration
    if where is None:
        raise ConfigError("--calibration, --test: name a directory of answers with one of them")
    tuning = rows_of(calibration) if calibration else {}
    tested = rows_of(where)
    found, kept = outcomes(where)
    chosen = tuned(tuning)
    console = wide_console()
    if tuning:
        console.print(rich_table(list(tuning.values()), "calibration"))
    if test is not None:
        console.print(rich_table(list(tested.values()), "test"))
    ours = [name for name in tested if "learned" in name]
    best = max(chosen.values(), key=lambda name: tuning[name]["accuracy"], default=None)
    rivals = {BASELINE, "draft", *chosen.values()} if calibration else set(tested) - set(ours)
    paired = against(found, ours, sorted(rivals))
    result: dict[str, Any] = {
        split: {"about": json.loads((work / ABOUT).read_text()), "modes": rows}
        for split, work, rows in (("calibration", calibration, tuning), ("test", test, tested))
        if work is not None
    }
    if calibration:
        result |= {"tuned": chosen, "best_rule": best}
    result |= {"paired": paired, "acceptance_lengths": times_strict(kept)}
    for name, pair in paired.items():
        console.print(f"{name}: {100 * pair['difference']:+.1f} points, +{pair['gained']} -{pair['lost']}, "
                      f"p = {pair['p_value']:.2g}", markup=False)  # fmt: skip
    if json_path is not None:
        write_result(json_path, result)
        grouped = families(tested)
        n = next(iter(tested.values()))["num_problems"]
        where_name = "calibration" if test is None else "test"
        plot_accuracy(
            json_path.with_suffix(".png"), grouped, title=f"{n} lines of the {where_name} split, greedy, 95 % intervals"
        )


if __name__ == "__main__":
    run_command(app)
