"""Trains the bundled pair from scratch: a generalist target and a specialist draft, on written-out arithmetic.

Both are character-level Llamas that see the same kind of problem in different proportions: the target mostly
sums and differences, the draft mostly products. Where they disagree, each is the better one about half of the
time, which is what an arbiter needs. Everything is seeded; a run that was stopped continues with ``--resume``.

    python -m vllm_cospec.training.pairs.demo --output vllm_cospec/demo
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_cospec.atomic import new_directory
from vllm_cospec.training.pairs.language_model import IGNORE, Stretch, train
from vllm_cospec.training.tasks.demo import draw_expression
from vllm_cospec.training.tasks.splits import split_of

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 128


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own problems and its own cosine."""

    steps: int
    learning_rate: float  # at its peak
    product_share: float  # probability that a term of a training problem is a product
    sum_share: float = 0.5  # probability that a later term is added rather than subtracted
    large_share: float = 0.0  # probability that a product's second factor has two digits
    single_terms: bool = True  # whether problems of a single product occur
    horizon: int | None = None  # steps the cosine is laid out for, when the phase ends before it does
    learnt: tuple[float, float] = (1.0, 1.0)  # share of the results of products, and of other steps, that is learnt


@dataclass(frozen=True)
class ModelPlan:
    """Architecture and schooling of one model of the pair.

    Both models first go to a school of their own, then both see problems like those of the task, so that both know how
    a derivation is written. There the results of the other's speciality are left out of almost every lesson.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    batch_size: int
    seed: int
    phases: tuple[Phase, ...]


PLANS = {
    "target": ModelPlan(
        160, 448, 4, 5, batch_size=128, seed=1,
        phases=(
            Phase(5000, 2.5e-3, product_share=0.02, sum_share=0.55),
            Phase(750, 1e-3, horizon=1000, product_share=0.4, large_share=0.5, single_terms=False,
                  learnt=(0.03, 1.0)),
        ),
    ),
    "draft": ModelPlan(
        64, 192, 2, 2, batch_size=192, seed=2,
        phases=(
            Phase(4000, 4e-3, product_share=0.85, sum_share=0.5),
            Phase(1750, 3e-3, product_share=0.5, large_share=0.6, single_terms=False, learnt=(1.0, 0.03)),
        ),
    ),
}  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; anything else is ``<unk>``."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNK, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=CONTEXT,
        chat_template="{{ bos_token }}{{ messages[-1]['content'] }}",
        clean_up_tokenization_spaces=False,
    )


def build_model(plan: ModelPlan, vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised model of the plan's shape, seeded."""
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=plan.hidden_size,
            intermediate_size=plan.intermediate_size,
            num_hidden_layers=plan.num_layers,
            num_attention_heads=plan.num_heads,
            num_key_value_heads=plan.num_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def draw_examples(phase: Phase, seed: int, count: int) -> list[tuple[str, str]]:
    """Draw ``count`` (prompt, solution) pairs in a phase's proportions, from the ``pretrain`` split only."""
    rng = random.Random(seed)
    singles = phase.product_share * 0.2 if phase.single_terms else 0.0
    examples: list[tuple[str, str]] = []
    while len(examples) < count:
        num_terms = rng.choices((1, 2, 3), weights=(singles, 0.3, 0.6))[0]
        expression = draw_expression(rng, num_terms, phase.product_share, phase.sum_share, phase.large_share)
        if split_of(expression.prompt) == "pretrain":
            examples.append((expression.prompt, expression.solution))
    return examples


def tokenise(
    examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, learnt: tuple[float, float], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn examples into padded ids and labels, both int64 [count, longest].

    Only the solution is learnt, and of the results of products and of other steps only the shares in ``learnt``.
    """
    rng = random.Random(seed)
    ids = [[*tokenizer.encode(prompt + solution), tokenizer.eos_token_id] for prompt, solution in examples]
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), tokenizer.pad_token_id)
    labels = torch.full((len(ids), longest), IGNORE)
    for row, (row_ids, (prompt, solution)) in enumerate(zip(ids, examples, strict=True)):
        tokens[row, : len(row_ids)] = torch.tensor(row_ids)
        first = 1 + len(prompt)
        labels[row, first : len(row_ids)] = tokens[row, first : len(row_ids)]
        if learnt == (1.0, 1.0):
            continue
        for step in solution.partition("#")[0].split(";"):
            if rng.random() >= learnt[0 if "*" in step else 1]:
                labels[row, first + step.index("=") + 1 : first + len(step)] = IGNORE
            first += len(step) + 1
    return tokens, labels


def train_model(
    role: str, plan: ModelPlan, tokenizer: PreTrainedTokenizerFast, work: Path, resume: bool
) -> LlamaForCausalLM:
    """Train one model of the pair; its checkpoint is ``work/ROLE.safetensors``."""

    def stretch(number: int, phase: Phase) -> Stretch:
        def lessons() -> tuple[torch.Tensor, torch.Tensor]:
            seed = plan.seed + 10 * number
            examples = draw_examples(phase, seed, min(phase.steps * plan.batch_size, 400_000))
            return tokenise(examples, tokenizer, phase.learnt, seed)

        return Stretch(phase.steps, phase.learning_rate, lessons, phase.horizon)

    model = build_model(plan, len(tokenizer))
    train(
        role, model, [stretch(number, phase) for number, phase in enumerate(plan.phases)], plan.batch_size,
        plan.seed, work / f"{role}.safetensors", resume, checkpoint_every=250, pad=tokenizer.pad_token_id,
    )  # fmt: skip
    return model


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a checkpoint directory that vLLM and transformers load; other files of an older one are kept."""
    with new_directory(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        for older in directory.glob("*"):
            if not (partial / older.name).exists():
                shutil.copy(older, partial)  # cospec.json


def main(
    output: Annotated[Path, typer.Option(help="Directory that receives target/ and draft/.")],
    work: Annotated[Path, typer.Option(help="Directory for checkpoints of the run.")] = Path("runs/demo_pair"),
    only: Annotated[str, typer.Option(help="Train just this one: target or draft.")] = "",
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the bundled pair from scratch and write both models."""
    if only and only not in PLANS:
        raise typer.BadParameter(f"--only: {only!r} is neither 'target' nor 'draft'")
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    for role, plan in PLANS.items():
        if only in ("", role):
            export(train_model(role, plan, tokenizer, work, resume), tokenizer, output / role)


if __name__ == "__main__":
    typer.run(main)
