"""What the draft of the code pair is trained on: token ids of the pretrain split, and a vocabulary made for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_cospec.atomic import new_file
from vllm_cospec.training.tasks.code_corpus import Source

END_OF_FILE = 0  # the tokenizer's <|endoftext|>
LEAST_COUNT = 8  # a token that occurs less often shares the last row with all that do not occur


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that have a row of their own."""

    used: torch.Tensor  # int64 [rows], ascending ids of the full vocabulary; row len(used) is that of all others
    full_size: int

    @property
    def others(self) -> int:
        """Number of tokens without a row of their own."""
        return self.full_size - len(self.used)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the row of each token id, int64 of the same shape."""
        places = torch.full((self.full_size,), len(self.used))
        places[self.used] = torch.arange(len(self.used))
        return places[ids]


def token_stream(sources: list[Source], tokenizer: Any) -> torch.Tensor:
    """Return the ids of all files end to end, int32 [n], each followed by END_OF_FILE."""
    pieces = []
    for source in sources:
        ids = tokenizer(source.text, add_special_tokens=False)["input_ids"]
        pieces.append(np.array([*ids, END_OF_FILE], np.int32))
    return torch.from_numpy(np.concatenate(pieces))


def cached_stream(file: Path, sources: list[Source], tokenizer: Any) -> torch.Tensor:
    """Return :func:`token_stream`, kept in a file whose name must change with the sources."""
    if not file.exists():
        with new_file(file) as partial:
            save_file({"ids": token_stream(sources, tokenizer)}, partial)
    return load_file(file)["ids"]


def vocabulary_of(stream: torch.Tensor, full_size: int) -> Vocabulary:
    """Return the vocabulary of the tokens that occur at least LEAST_COUNT times."""
    counts = torch.bincount(stream.long(), minlength=full_size)
    return Vocabulary(torch.nonzero(counts >= LEAST_COUNT).flatten(), full_size)


def initial_embedding(target: str, vocabulary: Vocabulary, hidden_size: int, std: float) -> torch.Tensor:
    """Return the target's embedding along its main axes, float32 [rows + 1, hidden], with the given deviation.

    Tokens that are alike for the target start alike, so rare ones need not be learnt from their few occurrences. The
    row of all other tokens starts as their mean.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    full: torch.Tensor = model.get_input_embeddings().weight.detach()
    own = full[vocabulary.used].double()
    apart = torch.ones(len(full), dtype=torch.bool)
    apart[vocabulary.used] = False
    rows = torch.cat([own, full[apart].double().mean(0, keepdim=True)]) - own.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)  # in ascending order
    flat = rows @ axes[:, -hidden_size:].flip(1)
    return (flat * (std / flat.std())).float()


def windows(stream: torch.Tensor, step: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """Return a step's windows, int64 [batch, length + 1]. Each pass cuts the text elsewhere, in another order."""
    per_pass = (len(stream) - 1 - length) // length
    chosen = []
    for number in range(step * batch, (step + 1) * batch):
        passes, at = divmod(number, per_pass)
        offset, order = _pass(passes, per_pass, length, seed)
        first = offset + int(order[at]) * length
        chosen.append(stream[first : first + length + 1])
    return torch.stack(chosen).long()


_passes: dict[tuple[int, int, int, int], tuple[int, torch.Tensor]] = {}


def _pass(number: int, count: int, length: int, seed: int) -> tuple[int, torch.Tensor]:
    key = number, count, length, seed
    if key not in _passes:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        offset = int(torch.randint(length, (), generator=generator))
        _passes[key] = offset, torch.randperm(count, generator=generator)
    return _passes[key]


def line_ends(tokenizer: Any) -> list[int]:
    """Return the ids of all tokens with a line break in them; indentation makes many of one."""
    texts = tokenizer.batch_decode([[at] for at in range(len(tokenizer))])
    return [at for at, text in enumerate(texts) if "\n" in text]
