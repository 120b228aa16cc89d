"""Completions token by token: what the draft proposed, what the target wanted, what the arbiter made of it.

An engine completes the lines, strictly and with the arbiter; tokens, steps, decisions and scores are its own. It does
not say what both models wanted at every position, so that is played again by transformers and the project's reference
(kernels/reference.py), and has to agree with the engine in everything that the engine says. Both run in float32.

    python -m benchmarks.walkthrough --json benchmarks/results/walkthrough.json
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.command import run as run_command
from benchmarks.natural import ask, build_engine, contestants
from vllm_cospec.arbiter import Arbiter, load_artefact
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.reference import Block, verify_block
from vllm_cospec.training.config import PairConfig, cached_pair
from vllm_cospec.training.measure.provenance import write_result

ARBITER = Path("benchmarks/code/arbiter")
LINES = Path("benchmarks/code/walkthrough.toml")
MAX_TOKENS = 48
SAME_SCORE = 1e-3  # engine and transformers add in another order


@dataclass(frozen=True)
class Row:
    """One token of a completion."""

    draft: int | None  # None where nothing was drafted
    target: int
    score: float | None  # of the arbiter, where it was asked
    emitted: int
    step: int  # of the target, from 0: the prompt's own


@dataclass(frozen=True)
class Line:
    """A line to complete, written for this."""

    name: str
    prompt: str
    answer: str  # the rest of the line


def read_lines(path: Path) -> list[Line]:
    """Read lines from a TOML file.

    Raises:
        ConfigError: it is none, or a line lacks something.
    """
    try:
        return [Line(**line) for line in tomllib.loads(path.read_text())["line"]]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"--lines: {path} is no list of [[line]] with name, prompt and answer ({error})") from None


@torch.inference_mode()
def last_logits(model: Any, ids: list[int], count: int) -> Tensor:
    """Return the logits behind each of the last ``count`` tokens, float32 [count, V]."""
    return model(input_ids=torch.tensor([ids]), logits_to_keep=count).logits[0].float()


def play(
    models: tuple[Any, Any], arbiter: Arbiter, threshold: float, ids: list[int], k: int, ends: set[int]
) -> list[Row]:
    """Complete a prompt.

    Args:
        models: target and draft.
        arbiter: asked at the mismatches; a draft is kept where its score exceeds the threshold.
        threshold: see ``arbiter``.
        ids: the prompt.
        k: draft tokens per step.
        ends: tokens that end the completion.
    """
    target, draft = models
    first = int(last_logits(target, ids, 1)[0].argmax())
    rows = [Row(None, first, None, first, 0)]
    overrides = step = 0
    while rows[-1].emitted not in ends and len(rows) < MAX_TOKENS:
        step += 1
        text = ids + [row.emitted for row in rows]
        drafts: list[int] = []
        draft_logits: list[Tensor] = []
        for _ in range(k):
            draft_logits.append(last_logits(draft, text + drafts, 1)[0])
            drafts.append(int(draft_logits[-1].argmax()))
        logits = last_logits(target, text + drafts, k + 1)
        wanted = logits.argmax(-1).tolist()
        scores: dict[int, float] = {}

        def keep(statistics: Tensor, position: int, scores: dict[int, float] = scores) -> bool:
            with torch.no_grad():
                scores[position] = float(arbiter(statistics[None])[0])
            return scores[position] > threshold

        block = Block(
            drafts, [d == w for d, w in zip(drafts, wanted[:k], strict=True)], wanted[:k], wanted[k], logits[:k],
            logits[:k], torch.stack(draft_logits), k, output_position=len(rows), overrides_so_far=overrides,
        )  # fmt: skip
        result = verify_block(block, keep)
        overrides += len(result.overrides)
        for at, token in enumerate(result.tokens):
            rows.append(Row(drafts[at] if at < k else None, wanted[at], scores.get(at), token, step))
            if token in ends:
                break
    return rows[:MAX_TOKENS]


def check(rows: Sequence[Row], response: Any) -> None:
    """See to it that what was played is what the engine did.

    Raises:
        ConfigError: something differs.
    """
    sizes = [sum(row.step == step for row in rows) for step in range(rows[-1].step + 1)]
    asked = {at: row for at, row in enumerate(rows) if row.score is not None}
    decided = {decision.output_position: decision for decision in response.decisions}
    alike = (
        [row.emitted for row in rows] == response.tokens
        and sizes == response.emitted
        and asked.keys() >= decided.keys()
        and all(asked[at].emitted == asked[at].draft or not decision.kept for at, decision in decided.items())
        and all(abs(asked[at].score - one.probability) < SAME_SCORE for at, one in decided.items())
    )
    if not alike:
        raise ConfigError(
            "--pair: the engine and transformers complete a line differently, at a near-tie perhaps; change the line"
        )


def shown(token: str) -> str:
    """Return a token as code in a table; a space at its beginning can be seen."""
    return "`" + token.replace("\n", "\\n").replace("|", "\\|") + "`" if token else ""


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """Return a table, a row for each token; rows as in the result file."""
    lines = ["| step | draft | target | arbiter's score | taken |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = "" if row["score"] is None else f"{row['score']:.2f}: {row['kept']}"
        lines.append(
            f"| {row['step']} | {shown(row['draft'])} | {shown(row['target'])} | {verdict} | {shown(row['emitted'])} |"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
    """Return rows with their tokens as text."""

    def text(token: int | None) -> str:
        return "" if token is None else str(tokenizer.decode([token]))

    return [
        asdict(row)
        | {"draft": text(row.draft), "target": text(row.target), "emitted": text(row.emitted)}
        | {"score": None if row.score is None else round(row.score, 3)}
        | {"kept": None if row.score is None else "draft" if row.emitted == row.draft else "target"}
        for row in rows
    ]


def completed(rows: Sequence[Row], tokenizer: Any, answer: str) -> dict[str, Any]:
    """Return what a mode wrote: the line, its steps up to the line's end, and its rows up to there."""
    written, kept = "", []
    for row in rows:
        kept.append(row)
        written += str(tokenizer.decode([row.emitted], skip_special_tokens=True))
        if "\n" in written:
            break
    line = written.partition("\n")[0].strip()
    return {
        "line": line, "right": line == answer.strip(), "steps": kept[-1].step, "rows": as_json(kept, tokenizer),
    }  # fmt: skip


def main(
    lines: Annotated[Path, typer.Option(help="TOML file of the lines.")] = LINES,
    pair: Annotated[Path | None, typer.Option(help="Directory with target/ and draft/; the cache by default.")] = None,
    artefact: Annotated[Path, typer.Option(help="Directory of the arbiter.")] = ARBITER,
    threshold: Annotated[float, typer.Option(help="Of the arbiter.")] = 0.7,
    k: Annotated[int, typer.Option("--num-speculative-tokens", min=1, help="Draft tokens per step.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Complete lines strictly and with the arbiter, and show them token by token, as Markdown."""
    pair = pair or cached_pair("code")
    wanted = read_lines(lines)
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    ends = set(GenerationConfig.from_pretrained(pair / "target").eos_token_id)
    prompts = [tokenizer(line.prompt, add_special_tokens=False)["input_ids"] for line in wanted]
    engine_settings = {
        "dtype": "float32", "max_model_len": 384, "max_num_seqs": 1, "enforce_eager": True,
        "kv_cache_memory_bytes": 2**28,
    }  # fmt: skip
    served = PairConfig(
        target=str(pair / "target"), draft=str(pair / "draft"), num_speculative_tokens=k, engine=engine_settings
    )
    asked = contestants(["strict", f"a: learned(threshold={threshold:g})"], {"a": artefact})
    engine = build_engine(served, asked)
    answers = {one.mode.kind: ask(engine, one, prompts, MAX_TOKENS, 0.0) for one in asked}
    target, draft = (AutoModelForCausalLM.from_pretrained(pair / role).float().eval() for role in ("target", "draft"))
    arbiter, _ = load_artefact(artefact)
    found = []
    for number, (line, ids) in enumerate(zip(wanted, prompts, strict=True)):
        entry: dict[str, Any] = {"name": line.name, "prompt": line.prompt, "answer": line.answer}
        for name, limit in (("strict", 1.0), ("learned", threshold)):
            rows = play((target, draft), arbiter, limit, ids, k, ends)
            check(rows, answers[name][number])
            entry[name] = completed(rows, tokenizer, line.answer)
            told = entry[name]
            print(f"{line.name}, {name}, {told['steps']} steps, right: {told['right']}: `{told['line']}`\n")
        print(markdown(entry["learned"]["rows"]) + "\n")
        found.append(entry)
    if json_path is not None:
        write_result(json_path, {"threshold": threshold, "num_speculative_tokens": k, "lines": found})


if __name__ == "__main__":
    run_command(main)
