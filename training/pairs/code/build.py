"""Builds the code pair in the user's cache: SmolLM2-135M-Instruct as a completer, and a draft that knows a code base.

The target is that of the SmolLM2 pair without a chat template; a token with a line break in it ends an answer. The
draft is kept without rows for tokens its training text does not have; here they get theirs back.

    python -m vllm_cospec.training.pairs.code.build --draft benchmarks/code/draft
    python -m vllm_cospec.training.pairs.code.build --draft benchmarks/code/draft --pack runs/code_draft
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_cospec.atomic import new_directory, new_file, write_text
from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.training.config import cached_pair
from vllm_cospec.training.measure.provenance import environment
from vllm_cospec.training.pairs.code.draft import LOG, STATE
from vllm_cospec.training.pairs.code.llama import EMBEDDING, Shape
from vllm_cospec.training.pairs.code.text import END_OF_FILE, line_ends
from vllm_cospec.training.tasks.code_corpus import fingerprint, read_corpus
from vllm_cospec.training.tasks.code_lines import LEARNT_PACKAGE, TRAINING

WEIGHTS = "weights.safetensors"
CARD = "README.md"
END_OF_TURN = 2
POSITIONS = 8192  # the target's


def build_target(source: Path, directory: Path) -> None:
    """Copy the SmolLM2 pair's target, as a completer of lines."""
    with new_directory(directory) as partial:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(source / name, partial)
        finish(AutoTokenizer.from_pretrained(source), partial)


def finish(tokenizer: Any, directory: Path) -> None:
    """Add tokenizer and generation settings to a directory of weights."""
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    ends = {"eos_token_id": [END_OF_FILE, END_OF_TURN, *line_ends(tokenizer)], "bos_token_id": 1, "pad_token_id": 2}
    (directory / "generation_config.json").write_text(json.dumps(ends) + "\n")
    for file in directory.iterdir():
        file.chmod(0o644)


def pack(work: Path, directory: Path) -> None:
    """Write what a training run made to ``directory``: its weights in bfloat16, and what they were trained on.

    A run that has not come to its end can be packed too; ``progress`` says where it was.

    Raises:
        ConfigError: there is no run, or other files are installed than it was made with.
    """
    try:
        with safe_open(work / STATE, "pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118 - not a dict
            tensors = {name.removeprefix("weights."): file.get_tensor(name).bfloat16() for name in names}
            tensors["used"] = file.get_tensor("used").int()
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--pack: {work} holds no training run ({error})") from None
    records = [json.loads(line) for line in (work / LOG).read_text().splitlines()]
    text = next(record for record in records if "text" in record)
    last = [record for record in records if "held_out_loss" in record][-1]
    splits = fingerprint(read_corpus(LEARNT_PACKAGE))
    if splits["pretrain"] != text["text"]:
        raise ConfigError(f"--pack: the run in {work} was made with other files of {LEARNT_PACKAGE} than are installed")
    made = {"version": version(LEARNT_PACKAGE), "splits": splits, **about, "last_measured": last}
    made["environment"] = environment()
    write_text(directory / TRAINING, json.dumps(made, indent=2) + "\n")
    with new_file(directory / WEIGHTS) as partial:
        save_file(tensors, partial)


def build_draft(source: Path, tokenizer: Any, target: Path, directory: Path) -> None:
    """Write a packed draft as a checkpoint over the target's whole vocabulary, in bfloat16.

    Raises:
        ConfigError: there is no packed draft.
    """
    try:
        with safe_open(source / WEIGHTS, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        shape = Shape(**json.loads((source / TRAINING).read_text())["recipe"]["shape"])
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--draft: {source} holds no packed draft ({error})") from None
    used = weights.pop("used").long()
    size = AutoConfig.from_pretrained(target).vocab_size
    small = weights[EMBEDDING]
    weights[EMBEDDING] = small[-1].repeat(size, 1)
    weights[EMBEDDING][used] = small[:-1]
    model = LlamaForCausalLM(llama_config(shape, size)).bfloat16()
    model.load_state_dict({**weights, "lm_head.weight": weights[EMBEDDING]})
    with new_directory(directory) as partial:
        model.save_pretrained(partial)
        for name in (TRAINING, CARD):
            if (source / name).exists():
                shutil.copy(source / name, partial)
        finish(tokenizer, partial)


def llama_config(shape: Shape, vocabulary: int) -> LlamaConfig:
    """Return transformers' description of a model of this shape."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=END_OF_TURN,
    )


def main(
    draft: Annotated[Path, typer.Option(help="Directory of the packed draft.")],
    pack_from: Annotated[
        Path | None, typer.Option("--pack", help="Directory of a training run to pack into --draft before.")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="The SmolLM2 pair's target; by default from the cache.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for target/ and draft/; a cache by default.")] = None,
) -> None:
    """Build target and draft of the code pair."""
    source = target or cached_pair("smollm2") / "target"
    if not (source / "model.safetensors").is_file():
        raise ConfigError(f"--target: no model in {source}; run make smollm2")
    output = output or cached_pair("code")
    if pack_from is not None:
        pack(pack_from, draft)
    build_target(source, output / "target")
    build_draft(draft, AutoTokenizer.from_pretrained(source), source, output / "draft")
    print(f"the pair is in {output}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except CoSpecError as error:
        raise SystemExit(f"code: {error}") from None
