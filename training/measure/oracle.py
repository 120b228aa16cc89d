"""How much room a pair leaves an arbiter: accuracy of target, draft, either, and of an oracle at the mismatches.

The demo task has one correct derivation per problem, so everything can be read off two teacher-forced passes over it.
The oracle plays the game of :mod:`vllm_cospec.kernels.reference` on that text: blocks of K drafts, and at each mismatch
it takes whichever token stays on the derivation. What it cannot repair are tokens only the target proposes (the first
one, and the bonus token after a block that was kept whole) and places where both are wrong.

    python -m vllm_cospec.training.measure.oracle --pair vllm_cospec/demo --problems 2000
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_cospec.training.tasks.demo import DemoTask

BATCH = 100


@dataclass(frozen=True)
class Walk:
    """What verification with an oracle made of one derivation."""

    correct: bool  # every emitted token stayed on it
    tokens: int
    steps: int  # of the target


def walk(target: list[int], draft: list[int], truth: list[int], k: int) -> Walk:
    """Verify one derivation with an oracle at the mismatches.

    Args:
        target: the target's greedy token at each position of the derivation, given its true beginning.
        draft: likewise the draft's.
        truth: the derivation.
        k: draft tokens per step.
    """
    position, steps = 0, 0
    while position < len(truth):
        steps += 1
        kept = 0
        # The first step follows the prompt: nothing has been drafted yet.
        while steps > 1 and kept < k and position < len(truth):
            if draft[position] not in (target[position], truth[position]):
                break
            if draft[position] != truth[position]:
                return Walk(False, position, steps)  # both agree, both wrong: nobody is asked
            position, kept = position + 1, kept + 1
        if position < len(truth):
            if target[position] != truth[position]:
                return Walk(False, position, steps)
            position += 1
    return Walk(True, position, steps)


def greedy_choices(directory: Path, texts: list[tuple[str, str]]) -> list[list[int]]:
    """Return a model's greedy token at each position of every solution and of its end, given the true beginning."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    choices: list[list[int]] = []
    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    for batch in track(batches, description=directory.name, console=Console(stderr=True)):
        encoded = tokenizer([prompt + solution for prompt, solution in batch], return_tensors="pt", padding=True)
        with torch.no_grad():
            best: Tensor = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits.argmax(-1)
        for row, (prompt, solution) in zip(best, batch, strict=True):
            first = len(prompt)  # the token before the solution: <bos> and the prompt precede it
            choices.append(row[first : first + len(solution) + 1].tolist())
    return choices


def measure(pair: Path, num_problems: int, seed: int, k: int) -> dict[str, float]:
    """Return accuracies on held-out problems, and tokens per target step of strict and of the oracle."""
    stream = DemoTask().expressions(seed, "test")
    texts = [(e.prompt, e.solution) for e, _ in zip(stream, range(num_problems), strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    truths = [[*tokenizer.encode(s, add_special_tokens=False), tokenizer.eos_token_id] for _, s in texts]
    targets, drafts = (greedy_choices(pair / role, texts) for role in ("target", "draft"))
    walks = [walk(*row, k) for row in zip(targets, drafts, truths, strict=True)]
    target_right = [a == b for a, b in zip(targets, truths, strict=True)]
    draft_right = [a == b for a, b in zip(drafts, truths, strict=True)]
    strict = [walk(t, d, t, k) for t, d, right in zip(targets, drafts, target_right, strict=True) if right]
    finished = [w for w in walks if w.correct]
    n = len(texts)
    return {
        "num_problems": n,
        "target": sum(target_right) / n,
        "draft": sum(draft_right) / n,
        "either": sum(a or b for a, b in zip(target_right, draft_right, strict=True)) / n,
        "oracle": len(finished) / n,
        "oracle_tokens_per_step": sum(w.tokens for w in finished) / max(1, sum(w.steps for w in finished)),
        "strict_tokens_per_step": sum(w.tokens for w in strict) / max(1, sum(w.steps for w in strict)),
    }


def main(
    pair: Annotated[Path, typer.Option(help="Directory with target/ and draft/.")],
    problems: Annotated[int, typer.Option(min=1, help="How many held-out problems.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 2026,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="K.")] = 7,
) -> None:
    """Measure the room a pair leaves an arbiter and print it as JSON."""
    print(json.dumps(measure(pair, problems, seed, num_speculative_tokens), indent=2))


if __name__ == "__main__":
    typer.run(main)
