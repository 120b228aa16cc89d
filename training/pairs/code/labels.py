"""Labels for an arbiter from text alone: where target and draft disagree along a file, whom does the file prove right?

Two teacher-forced passes over windows of a split's files give both models' rows of logits at every position. The game
of verification is played along the text: blocks of K drafts, in which an oracle keeps the draft's token where the text
has it and the target does not. Every mismatch where one of the two is right becomes a label. A window of 320 tokens
gives some 25, where a rolled-out branch costs a completion and is seldom telling; what the text cannot show is how the
models go on after a token that is not the text's.

    python -m vllm_cospec.training.pairs.code.labels --windows 1000 --output runs/code_labels.safetensors
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_cospec.atomic import new_file
from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.kernels.cpu import logit_statistics
from vllm_cospec.kernels.statistics import INDEX, NUM_STATISTICS
from vllm_cospec.training.config import cached_pair
from vllm_cospec.training.pairs.code.text import line_ends, token_stream
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.tasks.code_corpus import read_corpus
from vllm_cospec.training.tasks.code_lines import LEARNT_PACKAGE, Half, half_of, load_tokenizer

LENGTH, FIRST = 320, 120  # tokens of a window; those before FIRST are context alone
BATCH = 8


def places(
    target: list[int], draft: list[int], truth: list[int], first: int, k: int
) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Play verification along a line of text, with an oracle at the mismatches.

    Args:
        target, draft: greedy tokens at each position, given the text before; line breaks are all one token.
        truth: the text.
        first: where the completion begins. Its first token is the target's own: nothing has been drafted yet.
        k: draft tokens per step.

    Yields:
        Of each mismatch where one of the two is right: its position, 1 where that is the draft and -1 where it is the
        target, and the statistics that do not come from logits.
    """
    at, overrides = first + 1, 0
    while at < len(truth):
        block, matches, kept = at, 0, 0
        while at < len(truth) and at - block < k:
            if target[at] == draft[at]:
                at, matches = at + 1, matches + 1
                continue
            ahead = 0
            while at + 1 + ahead < min(len(truth), block + k) and target[at + 1 + ahead] == draft[at + 1 + ahead]:
                ahead += 1
            right = (draft[at] == truth[at]) - (target[at] == truth[at])
            if right:
                yield at, right, {
                    "block_position": (at - block) / k,
                    "lookahead_matches": ahead / k,
                    "matches_before": matches / k,
                    "overrides_in_block": float(kept),
                    "overrides_so_far": float(np.log1p(overrides)),
                    "output_position": float(np.log1p(at - first)),
                }  # fmt: skip
            if right <= 0:
                break
            at, kept, overrides = at + 1, kept + 1, overrides + 1
        at += 1  # the target's own: instead of the draft's, or behind a block that was kept whole


def lines_of(truth: list[int], is_end: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the lines that end within the window behind FIRST, from their first token to their line break included."""
    ends = [at for at, token in enumerate(truth) if is_end[token]]
    for before, end in itertools.pairwise(ends):
        if before >= FIRST and end - before > 2:
            yield before + 1, end + 1


@torch.inference_mode()
def label_windows(
    models: tuple[Any, Any], ids: Tensor, is_end: np.ndarray, k: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Label the mismatches of windows.

    Args:
        models: target and draft.
        ids: int64 [N, LENGTH].
        is_end: bool [V], tokens with a line break in them.
        k: draft tokens per step.
        rng: draws where in its first half a line is cut.

    Returns:
        Statistics, float32 [M, 16], and 1 or -1 for draft and target, float32 [M].
    """
    logits = [model(input_ids=ids).logits[:, :-1].float() for model in models]
    chosen = [rows.argmax(-1) for rows in logits]
    statistics, labels = [], []
    for n in range(len(ids)):
        truth = ids[n, 1:].tolist()
        target, draft = (rows[n].tolist() for rows in chosen)
        for start, stop in lines_of(truth, is_end):
            cut = start + int(rng.integers(1, max(2, (stop - start) // 2 + 1)))
            same = [[-1 if is_end[token] else token for token in side[:stop]] for side in (target, draft, truth)]
            found = list(places(same[0], same[1], same[2], cut, k))
            if not found:
                continue
            at = torch.tensor([place for place, _, _ in found])
            own = torch.zeros(len(found), NUM_STATISTICS)
            own[:, :10] = logit_statistics(logits[0][n, at], logits[1][n, at], chosen[1][n, at], chosen[0][n, at])
            for row, (_, _, others) in zip(own, found, strict=True):
                for name, value in others.items():
                    row[INDEX[name]] = value
            statistics.append(own)
            labels += [right for _, right, _ in found]
    if not labels:
        return torch.zeros(0, NUM_STATISTICS), torch.zeros(0)
    return torch.cat(statistics), torch.tensor(labels, dtype=torch.float32)


def main(
    output: Annotated[Path, typer.Option(help="File for statistics and labels (safetensors).")],
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 1000,
    split: Annotated[str, typer.Option(help="Whose files.")] = "train",
    seed: Annotated[int, typer.Option(help="Which windows, and where lines are cut.")] = 1,
    k: Annotated[int, typer.Option(min=1, help="Draft tokens per step.")] = 5,
    half: Annotated[str | None, typer.Option(help="first or second: of the package's directories alone.")] = None,
    pair: Annotated[Path | None, typer.Option(help="Directory with target/ and draft/; the cache by default.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Label mismatches along the files of a split."""
    torch.set_num_threads(threads)
    if half not in (None, *get_args(Half)):
        raise ConfigError(f"--half: {half!r} is none of {', '.join(get_args(Half))}")
    pair = pair or cached_pair("code")
    tokenizer = load_tokenizer(str(pair / "target"))
    sources = [source for source in read_corpus(LEARNT_PACKAGE) if source.split == split]
    stream = token_stream([own for own in sources if half in (None, half_of(own.path))], tokenizer).long()
    rng = np.random.default_rng(seed)
    is_end = np.zeros(len(tokenizer), bool)
    is_end[line_ends(tokenizer)] = True
    starts = rng.integers(0, len(stream) - LENGTH, windows)
    models: Any = tuple(
        AutoModelForCausalLM.from_pretrained(pair / role, dtype=torch.bfloat16).eval() for role in ("target", "draft")
    )
    parts = []
    with progress_bar("labelling", windows) as tick:
        for first in range(0, windows, BATCH):
            ids = torch.stack([stream[start : start + LENGTH] for start in starts[first : first + BATCH]])
            parts.append(label_windows(models, ids, is_end, k, rng))
            tick(len(ids))
    statistics, labels = (torch.cat(side) for side in zip(*parts, strict=True))
    with new_file(output) as partial:
        save_file({"statistics": statistics, "labels": labels}, partial)
    print(f"{len(labels)} labels, the draft right in {float((labels > 0).float().mean()):.1%}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except CoSpecError as error:
        raise SystemExit(f"labels: {error}") from None
