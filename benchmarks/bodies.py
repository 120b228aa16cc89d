"""Whole function bodies from the code pair: answers of up to 256 tokens, judged by a parser and by the target.

A prompt is what stands before a function of the code base, up to the colon of its header or the end of its docstring.
A body ends with the first line that is indented no deeper than the header. Beside the share that parses stands how
likely the target finds the body, in nats a token: arbitration may write what the target would not have written, and
this says how far it goes. No text of the code base is kept: bodies are named by file and line.

    python -m benchmarks.bodies --arbiter text=benchmarks/code/arbiter --mode 'text: learned(threshold=0.5)' --json FILE
"""

from __future__ import annotations

import ast
import codeop
import json
import random
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from rich.table import Table

from benchmarks.command import run as run_command
from benchmarks.command import wide_console
from benchmarks.natural import BASELINE, CONFIG, Contestant, ask, build_engine, contestants, named_arbiters
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import PairConfig, load_train_config
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.intervals import accuracy_interval, bootstrap_interval
from vllm_cospec.training.measure.outcome import changes
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.pairs.code.text import END_OF_FILE
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.tasks.code_corpus import Source, read_corpus
from vllm_cospec.training.tasks.code_lines import CONTEXT, LEARNT_PACKAGE, load_tokenizer, similarity
from vllm_cospec.training.tasks.splits import Split

MAX_TOKENS = 256
SHORTEST, LONGEST = 5, 25  # lines of a body that is asked for
LONGEST_PROMPT = 320  # tokens


@dataclass(frozen=True)
class Function:
    """A function whose body is asked for."""

    path: str
    line: int  # of its def, from 1
    prompt: str
    header: str  # its lines from def to where the body is asked for
    indent: int  # of def, in columns
    body: str


@dataclass(frozen=True)
class Body:
    """What a mode wrote."""

    tokens: list[int]  # up to the body's end
    text: str
    parses: bool
    capped: bool  # the longest answer ended before the body did


def functions_of(source: Source) -> Iterator[Function]:
    """Yield the functions of a file that may be asked for: SHORTEST to LONGEST lines below header and docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source.text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        documented = ast.get_docstring(node, clean=False) is not None
        if len(node.body) <= documented:
            continue
        first = node.body[documented].lineno  # from 1
        end = cast(int, node.end_lineno)
        begin = node.lineno - 1
        header = "\n".join(source.lines[begin : first - 1]).rstrip()
        plain = header.endswith((":", '"""', "'''"))  # neither a comment behind it nor a body on the header's line
        if plain and SHORTEST <= end - first + 1 <= LONGEST:
            above = begin
            while above > 0 and sum(len(line) + 1 for line in source.lines[above - 1 : begin]) < 4 * CONTEXT:
                above -= 1
            prompt = "\n".join([*source.lines[above:begin], header])
            yield Function(
                source.path, node.lineno, prompt, header, node.col_offset,
                "\n".join(source.lines[first - 1 : end]),
            )  # fmt: skip


def draw(split: Split, seed: int, count: int, tokenizer: Any) -> list[Function]:
    """Return functions of a split in a seeded order.

    Raises:
        ConfigError: there are fewer.
    """
    rng = random.Random(f"bodies/{split}/{seed}")
    sources = [source for source in read_corpus(LEARNT_PACKAGE) if source.split == split]
    found = [function for source in sources for function in functions_of(source)]
    rng.shuffle(found)
    short = [one for one in found if len(tokenizer(one.prompt)["input_ids"]) <= LONGEST_PROMPT]
    if len(short) < count:
        raise ConfigError(f"--problems: the {split} split has {len(short)} functions, {count} were asked for")
    return short[:count]


def body_of(function: Function, text: str, capped: bool) -> tuple[str, bool]:
    """Return the body a response begins with, and whether it ended there.

    Args:
        function: whose.
        text: the response; the rest of the header's line comes first.
        capped: the response was cut off, so its last line may be unfinished.
    """
    lines = text.split("\n")
    for number, line in enumerate(lines[1:], 1):
        if line.strip() and len(line) - len(line.lstrip()) <= function.indent:
            return "\n".join(lines[:number]), True
    return "\n".join(lines[:-1] if capped else lines), not capped


def parses(function: Function, body: str) -> bool:
    """Whether a body is Python below its header, or, cut off, the beginning of some: nothing in it is wrong yet."""
    text = textwrap.dedent(function.header + body)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codeop.compile_command(text + "\n", symbol="exec")
    except (SyntaxError, ValueError, OverflowError):
        return False
    return bool(body.strip())


def judge(function: Function, response: Any, tokenizer: Any) -> Body:
    """Cut a response to its body and say whether that parses."""
    text, ended = body_of(function, response.text, response.capped)
    tokens = list(response.tokens)
    while len(tokens) > 1 and len(tokenizer.decode(tokens[:-1])) >= len(text):
        tokens.pop()
    return Body(tokens, text, parses(function, text), not ended)


def beyond_lines(pair: PairConfig, directory: Path) -> PairConfig:
    """Return the pair for answers that go on behind a line break: the models as they lie there end at each.

    Args:
        pair: of the lines.
        directory: for the generation configuration; an engine has read it when it is built.
    """
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_OF_FILE]}))
    longest = LONGEST_PROMPT + MAX_TOKENS
    return pair.model_copy(
        update={"engine": {**pair.engine, "max_model_len": longest, "generation_config": str(directory)}}
    )


def load_judge(target: str) -> Any:
    """Return the target, by transformers in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()


def log_likelihoods(judge: Any, prompts: Sequence[Sequence[int]], bodies: Sequence[Sequence[int]]) -> list[float]:
    """Return the judge's mean log-probability of the tokens of each body, in nats."""
    import torch

    found = []
    with torch.inference_mode():
        for prompt, body in zip(prompts, bodies, strict=True):
            ids = torch.tensor([[*prompt, *body]])
            logits = judge(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            chosen = torch.log_softmax(logits, -1)[torch.arange(len(body)), ids[0, len(prompt) :]]
            found.append(float(chosen.mean()))
    return found


def row(
    name: str, functions: Sequence[Function], bodies: Sequence[Body], responses: Sequence[Any], nats: Sequence[float]
) -> dict[str, Any]:
    """Return the figures of a mode."""
    right = np.array([float(body.parses) for body in bodies])
    tokens, steps = (np.array([len(getattr(r, name)) for r in responses], np.int64) for name in ("tokens", "emitted"))
    decisions = [decision for response in responses for decision in response.decisions]
    return {
        "mode": name,
        "num_functions": len(functions),
        "parses": float(right.mean()),
        "parses_ci95": list(accuracy_interval(right)),
        "log_likelihood": float(np.mean(nats)),
        "edit_similarity": float(np.mean([similarity(f.body, b.text) for f, b in zip(functions, bodies, strict=True)])),
        "mean_tokens": float(np.mean([len(body.tokens) for body in bodies])),
        "unfinished": sum(body.capped for body in bodies),
        "acceptance_length": Counts.of_responses(tokens, steps).acceptance_length,
        "num_mismatches": len(decisions),
        "num_overrides": sum(decision.kept for decision in decisions),
        "each": [
            {"path": f.path, "line": f.line, "parses": b.parses, "log_likelihood": round(n, 4), "tokens": len(b.tokens)}
            for f, b, n in zip(functions, bodies, nats, strict=True)
        ],
    }


def against(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Compare two modes on the same functions, paired."""
    one, two = (np.array([float(entry["parses"]) for entry in row["each"]]) for row in (ours, theirs))
    nats = np.array(
        [a["log_likelihood"] - b["log_likelihood"] for a, b in zip(ours["each"], theirs["each"], strict=True)]
    )
    return {
        **changes(one, two),
        "log_likelihood": float(nats.mean()), "log_likelihood_ci95": list(bootstrap_interval(nats)),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Return the figures as a table for the terminal."""
    shown = Table(title=title)
    for heading in ("mode", "parses (95 %)", "nats a token", "edit similarity", "tokens", "unfinished", "acceptance"):
        shown.add_column(heading, justify="left" if heading == "mode" else "right")
    for one in rows:
        low, high = one["parses_ci95"]
        shown.add_row(
            one["mode"], f"{100 * one['parses']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            f"{one['log_likelihood']:.2f}", f"{one['edit_similarity']:.2f}", f"{one['mean_tokens']:.0f}",
            str(one["unfinished"]), f"{one['acceptance_length']:.2f}",
        )  # fmt: skip
    return shown


def main(
    config: Annotated[Path, typer.Option(help="TOML file of the pair.")] = CONFIG,
    split: Annotated[str, typer.Option(help="calibration or test.")] = "test",
    problems: Annotated[int, typer.Option(min=1, help="How many functions.")] = 150,
    seed: Annotated[int, typer.Option(help="Which of the split's functions.")] = 2026,
    mode: Annotated[
        list[str] | None, typer.Option(help="A mode to ask beside strict; NAME: learned(...) for a named arbiter.")
    ] = None,
    arbiter: Annotated[list[str] | None, typer.Option(help="NAME=DIRECTORY of a trained arbiter.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Ask modes for whole function bodies."""
    run = load_train_config(config)
    wanted: list[Contestant] = contestants([BASELINE, *(mode or ())], named_arbiters(arbiter))
    pair = run.pair
    tokenizer = load_tokenizer(pair.target)
    functions = draw(cast(Split, split), seed, problems, tokenizer)
    prompts = [tokenizer(function.prompt)["input_ids"] for function in functions]
    rows = []
    with tempfile.TemporaryDirectory(prefix="cospec-bodies-") as scratch:
        engine = build_engine(beyond_lines(run.pair, Path(scratch)), wanted)
    target = load_judge(pair.target)
    with progress_bar("writing", len(wanted)) as tick:
        for contestant in wanted:
            responses = ask(engine, contestant, prompts, MAX_TOKENS, 0.0)
            bodies = [judge(f, response, tokenizer) for f, response in zip(functions, responses, strict=True)]
            nats = log_likelihoods(target, prompts, [body.tokens for body in bodies])
            rows.append(row(contestant.name, functions, bodies, responses, nats))
            tick(1, contestant.name)
    paired = {one["mode"]: against(one, rows[0]) for one in rows[1:]}
    console = wide_console()
    console.print(table(rows, f"{len(functions)} functions of the {split} split, greedy, up to {MAX_TOKENS} tokens"))
    for name, pair_ in paired.items():
        low, high = pair_["log_likelihood_ci95"]
        console.print(
            f"{name} - {BASELINE}: parses +{pair_['gained']} -{pair_['lost']}, p = {pair_['p_value']:.2g}; "
            f"{pair_['log_likelihood']:+.3f} nats a token ({low:+.3f} to {high:+.3f})", markup=False,
        )  # fmt: skip
    if json_path is not None:
        about = {"split": split, "seed": seed, "max_tokens": MAX_TOKENS}
        write_result(json_path, {"schema": 1, **about, "modes": rows, "paired": paired})


if __name__ == "__main__":
    run_command(main)
