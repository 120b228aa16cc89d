"""Trains the draft of the code pair on the pretrain split of a code base.

Plain next-token loss on the files as they are. The learning rate is held and then taken to zero, so that a run can end
at any time and a later one can go on from where the rate was still held. The state is written every few minutes; a run
that was stopped continues with ``--resume`` as if it had not been, on one thread to the bit.

    python -m vllm_cospec.training.pairs.code.draft --work runs/code_draft --minutes 240 --threads 2
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from vllm_cospec.atomic import new_file
from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.training.config import cached_pair
from vllm_cospec.training.pairs.code.llama import (
    EMBEDDING,
    INITIAL_STD,
    Shape,
    Weights,
    hidden_states,
    new_weights,
    token_loss,
)  # fmt: skip
from vllm_cospec.training.pairs.code.text import (
    Vocabulary,
    cached_stream,
    initial_embedding,
    line_ends,
    vocabulary_of,
    windows,
)  # fmt: skip
from vllm_cospec.training.tasks import Problem
from vllm_cospec.training.tasks.code_corpus import fingerprint, read_corpus
from vllm_cospec.training.tasks.code_lines import LEARNT_PACKAGE, draw_problems

STATE, HELD, LOG = "state.safetensors", "before_decay.safetensors", "log.jsonl"
WARM_UP = 100
SETTLED = 30  # steps of an invocation after which its pace is known
DECAY_SHARE = 2.2  # steps of the decay for each step before it; most of a run: the rate that is held is a high one
MATRIX_RATE, OTHER_RATE, WEIGHT_DECAY = 0.02, 2e-3, 0.01


@dataclass(frozen=True)
class Hyperparameters:
    """What a run does; it cannot be changed on the way."""

    shape: Shape = field(default_factory=Shape)
    batch: int = 8
    length: int = 320  # a problem with its answer is shorter
    seed: int = 1


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    seconds: float = 0.0  # of training, over all invocations
    decay_from: int = -1  # step at which the rate begins to fall; negative while it is held
    decay_steps: int = 0

    @property
    def finished(self) -> bool:
        """Whether the rate has fallen to zero."""
        return self.decay_from >= 0 and self.step >= self.decay_from + self.decay_steps

    @property
    def rate(self) -> float:
        """Factor of the learning rate at this step."""
        if self.decay_from < 0:
            return min(1.0, (self.step + 1) / WARM_UP)
        return max(0.0, 1 - (self.step - self.decay_from) / self.decay_steps)


@dataclass
class Run:
    """A model in training."""

    hyperparameters: Hyperparameters
    vocabulary: Vocabulary
    weights: Weights
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        matrices = [weight for name, weight in self.weights.items() if weight.dim() == 2 and name != EMBEDDING]
        others = [weight for name, weight in self.weights.items() if weight.dim() == 1 or name == EMBEDDING]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, momentum=0.95, weight_decay=WEIGHT_DECAY), MATRIX_RATE),
            (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), OTHER_RATE),
        ]

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean loss over windows of token ids, int64 [batch, length + 1]."""
        rows = self.vocabulary.rows(ids)
        states = hidden_states(self.weights, rows[:, :-1], self.hyperparameters.shape).flatten(0, 1)
        return token_loss(states, self.weights[EMBEDDING], rows[:, 1:].flatten(), self.vocabulary.others)

    def learn(self, ids: torch.Tensor) -> float:
        """Take a step on windows of token ids and return their loss."""
        loss = self.loss(ids)
        loss.backward()
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.progress.rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write weights, optimiser state and progress to one file, atomically."""
        names = {weight: name for name, weight in self.weights.items()}
        tensors = {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors["used"] = self.vocabulary.used
        for optimizer, _ in self._optimizers:
            for weight, state in optimizer.state.items():
                tensors |= {f"{key}.{names[weight]}": torch.as_tensor(value) for key, value in state.items()}
        about = {"progress": json.dumps(asdict(self.progress)), "recipe": json.dumps(asdict(self.hyperparameters))}
        with new_file(path) as partial:
            save_file(tensors, partial, metadata=about)

    def restore(self, path: Path) -> None:
        """Take over what :meth:`save` wrote.

        Raises:
            ConfigError: it belongs to other hyperparameters or another text.
        """
        with safe_open(path, "pt") as file:
            about = file.metadata()
            if about["recipe"] != json.dumps(asdict(self.hyperparameters)):
                raise ConfigError(f"--resume: {path} was trained with other hyperparameters; choose another --work")
            if not torch.equal(file.get_tensor("used"), self.vocabulary.used):
                raise ConfigError(f"--resume: {path} was trained on another text; choose another --work")
            for name, weight in self.weights.items():
                weight.data.copy_(file.get_tensor(f"weights.{name}"))
            stored = set(file.keys())
            for optimizer, _ in self._optimizers:
                keys = ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else (
                    "step", "exp_avg", "exp_avg_sq",
                )  # fmt: skip
                for name, weight in self.weights.items():
                    if any(weight is own for group in optimizer.param_groups for own in group["params"]):
                        optimizer.state[weight] = {
                            key: file.get_tensor(f"{key}.{name}") for key in keys if f"{key}.{name}" in stored
                        }
            self.progress = Progress(**json.loads(about["progress"]))


@torch.no_grad()
def exact_match(run: Run, problems: list[Problem], tokenizer: Any) -> float:
    """Return the share of problems whose answer, and the line break after it, greedy decoding would produce.

    One forward pass: an answer is produced exactly when each of its tokens is the most probable one after those before.
    """
    breaks = torch.tensor(line_ends(tokenizer))
    is_break = torch.zeros(len(run.vocabulary.used) + 1, dtype=torch.bool)
    is_break[run.vocabulary.rows(breaks)] = True
    is_break[-1] = False
    right = 0
    for first in range(0, len(problems), 16):
        starts, texts = [], []
        for problem in problems[first : first + 16]:
            starts.append(len(tokenizer(problem.prompt, add_special_tokens=False)["input_ids"]))
            whole = problem.prompt + problem.metadata.text.removeprefix(problem.metadata.text[: -len(problem.answer)])
            texts.append(tokenizer(whole, add_special_tokens=False)["input_ids"])
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for at, text in enumerate(texts):
            ids[at, : len(text)] = torch.tensor(text)
        rows = run.vocabulary.rows(ids)
        states = hidden_states(run.weights, rows, run.hyperparameters.shape)
        for at, (start, text) in enumerate(zip(starts, texts, strict=True)):
            best = (states[at, start - 1 : len(text)] @ run.weights[EMBEDDING].bfloat16().T).argmax(-1)
            right += bool((best[:-1] == rows[at, start : len(text)]).all() and is_break[best[-1]])
    return right / len(problems)


def training(run: Run, stream: torch.Tensor, work: Path, minutes: float, steps: int) -> Iterator[dict[str, float]]:
    """Train until the rate has fallen to zero; yield a record after each step.

    The decay begins when ``steps`` steps are done or when it would take the rest of ``minutes`` minutes.
    """
    begun = time.monotonic()
    progress = run.progress
    first, before = progress.step, progress.seconds
    elapsed = pace = 0.0  # pace: seconds per step, records and states included; the first ones are slower
    while not progress.finished:
        decay = max(1, round(DECAY_SHARE * progress.step))
        late = progress.step >= first + SETTLED and elapsed + decay * pace >= 60 * minutes
        if progress.decay_from < 0 and (progress.step >= steps or late):
            run.save(work / HELD)
            progress.decay_from, progress.decay_steps = progress.step, decay
        ids = windows(
            stream, progress.step, run.hyperparameters.batch, run.hyperparameters.length, run.hyperparameters.seed
        )
        rate = progress.rate
        loss = run.learn(ids)
        progress.seconds = before + time.monotonic() - begun
        yield {
            "step": progress.step, "tokens": progress.step * ids[:, 1:].numel(), "rate": round(rate, 4),
            "loss": round(loss, 4), "seconds": round(progress.seconds, 1), "step_s": round(pace, 3),
        }  # fmt: skip
        now = time.monotonic() - begun
        pace = (
            now / (progress.step - first) if progress.step < first + SETTLED else 0.98 * pace + 0.02 * (now - elapsed)
        )
        elapsed = now


def held_out_loss(run: Run, stream: torch.Tensor) -> float:
    """Return the mean loss over 64 windows spread over a text the model does not learn."""
    length = run.hyperparameters.length
    starts = torch.linspace(0, len(stream) - length - 1, 64).long().tolist()
    ids = torch.stack([stream[start : start + length + 1] for start in starts]).long()
    with torch.no_grad():
        return sum(run.loss(part).item() for part in ids.split(16)) / 4


def main(
    work: Annotated[Path, typer.Option(help="Directory for state, log and the trained weights.")],
    minutes: Annotated[float, typer.Option(min=1, help="Time this invocation may take.")] = 240,
    steps: Annotated[int, typer.Option(min=1, help="Steps before the rate falls, if the time allows.")] = 1_000_000,
    target: Annotated[Path | None, typer.Option(help="The target; the SmolLM2 pair's by default.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last state.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Train the draft of the code pair."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    directory = str(target or cached_pair("smollm2") / "target")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    corpus = read_corpus(LEARNT_PACKAGE)
    digests = fingerprint(corpus)
    stream, others = (
        cached_stream(work / f"{split}-{digests[split][:12]}.safetensors", own, tokenizer)
        for split, own in ((s, [source for source in corpus if source.split == s]) for s in ("pretrain", "train"))
    )
    vocabulary = vocabulary_of(stream, len(tokenizer))
    hyperparameters = Hyperparameters()
    embedding = initial_embedding(directory, vocabulary, hyperparameters.shape.hidden_size, INITIAL_STD)
    run = Run(hyperparameters, vocabulary, new_weights(hyperparameters.shape, embedding, hyperparameters.seed))
    if resume and (work / STATE).exists():
        run.restore(work / STATE)
        if run.progress.finished:
            run.restore(work / HELD)
    problems = list(islice(draw_problems(LEARNT_PACKAGE, "train", 1, tokenizer), 256))
    parameters = sum(weight.numel() for weight in run.weights.values())
    about = {"text": digests["pretrain"], "tokens": len(stream), "rows": len(vocabulary.used)}
    with (work / LOG).open("a") as log:

        def note(entry: dict[str, Any]) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        note({"resumed_at": run.progress.step, "parameters": parameters, **about, "recipe": asdict(hyperparameters)})
        for record in training(run, stream, work, minutes, steps):
            if run.progress.step % 50 == 0 or run.progress.finished:
                run.save(work / STATE)
            if run.progress.step % 250 == 0 or run.progress.finished:
                record["held_out_loss"] = round(held_out_loss(run, others), 4)
                record["exact_match"] = round(exact_match(run, problems, tokenizer), 4)
            if run.progress.step % 10 == 0 or run.progress.finished:
                note(record)


if __name__ == "__main__":
    try:
        typer.run(main)
    except CoSpecError as error:
        raise SystemExit(f"draft: {error}") from None
