"""A completion token by token: what the draft proposed, what the target wanted, what the arbiter made of it.

Plays verification by the project's reference (kernels/reference.py) over two transformers models, greedily. Prompts
come from files; a file's last line is the one to complete.

    python -m benchmarks.walkthrough --pair ~/.cache/vllm-cospec/code --artefact benchmarks/code/arbiter FILE ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run as run_command
from vllm_cospec.arbiter import Arbiter, load_artefact
from vllm_cospec.kernels.reference import Block, verify_block

MAX_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """One token of a completion."""

    draft: int | None  # None where nothing was drafted
    target: int
    score: float | None  # of the arbiter, where it was asked
    emitted: int
    step: int  # of the target, from 0: the prompt's own


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
    return rows


def markdown(rows: list[Row], tokenizer: Any) -> str:
    """Return a table, a row for each token."""

    def shown(token: int | None) -> str:
        return "" if token is None else "`" + tokenizer.decode([token]).replace("\n", "\\n").replace("|", "\\|") + "`"

    lines = ["| step | draft | target | arbiter | taken |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = ""
        if row.score is not None:
            verdict = f"{row.score:.2f}: {'draft' if row.emitted == row.draft else 'target'}"
        lines.append(f"| {row.step} | {shown(row.draft)} | {shown(row.target)} | {verdict} | {shown(row.emitted)} |")
    return "\n".join(lines)


def main(
    prompts: Annotated[list[Path], typer.Argument(help="Files that end with a line to complete.")],
    pair: Annotated[Path, typer.Option(help="Directory with target/ and draft/.")],
    artefact: Annotated[Path, typer.Option(help="Directory of the arbiter.")],
    threshold: Annotated[float | None, typer.Option(help="Instead of the artefact's own.")] = None,
    k: Annotated[int, typer.Option("--num-speculative-tokens", min=1, help="Draft tokens per step.")] = 5,
) -> None:
    """Show completions token by token, as Markdown."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    ends = set(GenerationConfig.from_pretrained(pair / "target").eos_token_id)
    target, draft = (AutoModelForCausalLM.from_pretrained(pair / role).float().eval() for role in ("target", "draft"))
    arbiter, made = load_artefact(artefact)
    limit = made.threshold if threshold is None else threshold
    for path in prompts:
        ids = tokenizer(path.read_text().rstrip("\n"), add_special_tokens=False)["input_ids"]
        strict = play((target, draft), arbiter, 1.0, ids, k, ends)
        rows = play((target, draft), arbiter, limit, ids, k, ends)
        for name, found in (("target", strict), ("arbiter", rows)):
            line = str(tokenizer.decode([row.emitted for row in found], skip_special_tokens=True)).partition("\n")[0]
            print(f"{path.name}, {name}, {found[-1].step} steps: `{line.strip()}`\n")
        print(markdown(rows, tokenizer) + "\n")


if __name__ == "__main__":
    run_command(main)
