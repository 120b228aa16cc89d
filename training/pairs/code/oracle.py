"""How much there is to win on the code pair: along the right completion, who wants the right token?

Two teacher-forced passes over each line tell what target and draft would say at every position, given a right
beginning. From that follows whether either model completes the line, whether it takes one override of the target, or
several, and what an oracle at the mismatches of blocks of K drafts would make of it. An answer that is right in other
tokens than the tokenizer's own is not counted.

    python -m vllm_cospec.training.pairs.code.oracle --split calibration --problems 500
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM

from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.training.config import cached_pair
from vllm_cospec.training.measure.oracle import walk
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.pairs.code.text import line_ends
from vllm_cospec.training.tasks import Problem, Split, digest, load_task
from vllm_cospec.training.tasks.code_lines import load_tokenizer

BATCH = 16
END = -1  # stands for every token with a line break in it: each ends the answer


@dataclass(frozen=True)
class Choices:
    """What both models want along a right completion; END stands for the end of the line."""

    truth: list[int]
    target: list[int]
    draft: list[int]

    @property
    def overrides_needed(self) -> int | None:
        """Positions where the target is wrong; None where the draft is wrong too at one of them."""
        wrong = [d == t for t, p, d in zip(self.truth, self.target, self.draft, strict=True) if p != t]
        return len(wrong) if all(wrong) else None


def tokenise(problems: Sequence[Problem], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return prompt and answer of each problem in tokens, the answer without its end."""
    pairs = []
    for problem in problems:
        line = problem.metadata.text
        begun = problem.prompt.rpartition("\n")[2].lstrip()
        prompt = tokenizer(problem.prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(problem.prompt + line.removeprefix(begun), add_special_tokens=False)["input_ids"]
        pairs.append((prompt, whole[len(prompt) :]))
    return pairs


@torch.inference_mode()
def greedy_choices(directory: Path, pairs: Sequence[tuple[list[int], list[int]]], ends: set[int]) -> list[list[int]]:
    """Return a model's greedy token at each position of the answers and at their ends, given the right beginning."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    choices: list[list[int]] = []
    batches = [pairs[first : first + BATCH] for first in range(0, len(pairs), BATCH)]
    for batch in track(batches, description=directory.name, console=Console(stderr=True)):
        ids = torch.zeros(len(batch), max(len(prompt) + len(answer) for prompt, answer in batch), dtype=torch.int64)
        for row, (prompt, answer) in zip(ids, batch, strict=True):
            row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        states = model.model(input_ids=ids).last_hidden_state
        for row, (prompt, answer) in zip(states, batch, strict=True):
            best = model.lm_head(row[len(prompt) - 1 : len(prompt) + len(answer)]).argmax(-1).tolist()
            choices.append([END if token in ends else token for token in best])
    return choices


def figures(rows: Sequence[Choices], block_sizes: Sequence[int]) -> dict[str, Any]:
    """Return accuracies (shares of the problems) and, by K, what verification makes of them."""
    n = len(rows)
    needed = [row.overrides_needed for row in rows]
    positions = [position for row in rows for position in zip(row.truth, row.target, row.draft, strict=True)]
    mismatches = [position for position in positions if position[1] != position[2]]
    result: dict[str, Any] = {
        "num_problems": n,
        "target": sum(count == 0 for count in needed) / n,
        "draft": sum(row.draft == row.truth for row in rows) / n,
        "either": sum(count == 0 or row.draft == row.truth for row, count in zip(rows, needed, strict=True)) / n,
        "at_most_one_override": sum(count in (0, 1) for count in needed) / n,
        "any_overrides": sum(count is not None for count in needed) / n,
        "num_positions": len(positions),
        "num_mismatches": len(mismatches),
        "mismatches_target_right": sum(t == p for t, p, _ in mismatches) / max(1, len(mismatches)),
        "mismatches_draft_right": sum(t == d for t, _, d in mismatches) / max(1, len(mismatches)),
        "num_positions_target_right": sum(t == p for t, p, _ in positions),
        "num_positions_draft_right": sum(t == d for t, _, d in positions),
        "blocks": {},
    }
    for k in block_sizes:
        walks = [walk(row.target, row.draft, row.truth, k) for row in rows]
        strict = [walk(row.target, row.draft, row.target, k) for row in rows]
        result["blocks"][k] = {
            "oracle": sum(w.correct for w in walks) / n,
            "strict_tokens_per_step": sum(w.tokens for w in strict) / sum(w.steps for w in strict),
        }
    return result


def main(
    problems: Annotated[int, typer.Option(min=1, help="How many problems.")] = 500,
    split: Annotated[str, typer.Option(help="Whose problems.")] = "calibration",
    seed: Annotated[int, typer.Option(help="Which of the split's problems.")] = 2026,
    pair: Annotated[Path | None, typer.Option(help="Directory with target/ and draft/; the cache by default.")] = None,
    package: Annotated[str, typer.Option(help="Installed package whose lines are completed.")] = "vllm",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Measure the room the code pair leaves an arbiter and print it as JSON."""
    torch.set_num_threads(threads)
    if split not in get_args(Split):
        raise ConfigError(f"--split: {split!r} is none of {', '.join(get_args(Split))}")
    pair = pair or cached_pair("code")
    tokenizer = load_tokenizer(str(pair / "target"))
    task = load_task("code_lines", package=package, tokenizer=str(pair / "target"))
    drawn = task.problems(seed, problems, split)  # type: ignore[arg-type]
    pairs = tokenise(drawn, tokenizer)
    ends = set(line_ends(tokenizer))
    targets, drafts = (greedy_choices(pair / role, pairs, ends) for role in ("target", "draft"))
    rows = [Choices([*answer, END], t, d) for (_, answer), t, d in zip(pairs, targets, drafts, strict=True)]
    about = {"package": package, "split": split, "seed": seed, "problems_sha256": digest(drawn)}
    result = {**about, **figures(rows, (1, 2, 4, 5, 6, 8, 12))}
    print(json.dumps(result, indent=2))
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    try:
        typer.run(main)
    except CoSpecError as error:
        raise SystemExit(f"oracle: {error}") from None
