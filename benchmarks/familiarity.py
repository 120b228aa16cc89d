"""Does a draft's view of the prompt tell whether it knows the context? Then an arbiter could be asked only there.

Familiarity is the draft's mean log-probability of a prompt's last tokens, in nats, from one pass over it. Lines above a
cut keep what the arbiter answered, the others what strict verification did: for a whole response, so recorded answers
(:mod:`benchmarks.natural`) tell what would have come of it. Cut and threshold are chosen on calibration lines.

    python -m benchmarks.familiarity --calibration runs/natural/calibration --test runs/natural/test --json FILE
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from scipy.stats import mannwhitneyu

from benchmarks.command import run as run_command
from benchmarks.natural import ABOUT, BASELINE, outcomes
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import cached_pair
from vllm_cospec.training.counts import Counts
from vllm_cospec.training.measure.intervals import accuracy_interval
from vllm_cospec.training.measure.outcome import changes
from vllm_cospec.training.measure.provenance import write_result
from vllm_cospec.training.progress import progress_bar
from vllm_cospec.training.tasks import Problem, Split, digest, load_task
from vllm_cospec.training.tasks.code_lines import load_tokenizer

WINDOW = 64  # tokens of a prompt's end whose likelihood is asked for
DECILES = tuple(range(0, 100, 10))  # per cent of the calibration lines that a cut leaves to the target
MODES = ("text: learned(threshold=0.7)", "text: learned(threshold=0.5)")


@torch.inference_mode()
def log_likelihood(model: Any, prompts: Sequence[list[int]], tick: Any) -> np.ndarray:
    """Return a model's mean log-probability of each prompt's last WINDOW tokens, in nats, float64 [n]."""
    found = []
    for ids in prompts:
        tokens = torch.tensor([ids])
        count = min(WINDOW, len(ids) - 1)
        logits = model(input_ids=tokens, logits_to_keep=count + 1).logits[0, :-1].float()
        own = logits.gather(1, tokens[0, -count:, None])[:, 0] - logits.logsumexp(-1)
        found.append(float(own.mean()))
        tick(1, "")
    return np.array(found)


def drawn(work: Path) -> list[Problem]:
    """Return the lines that the answers of a directory are about.

    Raises:
        ConfigError: the installed package gives other ones.
    """
    about = json.loads((work / ABOUT).read_text())
    task = load_task(about["task"]["name"], **about["task"]["options"])
    skip = about.get("skipped", 0)
    problems = task.problems(about["seed"], skip + about["num_problems"], cast(Split, about["split"]))[skip:]
    if digest(problems) != about["problems_sha256"]:
        raise ConfigError(f"--calibration, --test: {work} is about other lines than the installed package gives")
    return problems


def auc(value: np.ndarray, positive: np.ndarray) -> float:
    """Return the chance that a positive one has the higher value."""
    higher = mannwhitneyu(value[positive], value[~positive]).statistic
    return float(higher) / float(positive.sum() * (~positive).sum())


class AnsweredLines:
    """What was recorded of some lines, by mode."""

    def __init__(self, work: Path, familiarity: np.ndarray):
        found, kept = outcomes(work)
        self.familiarity = familiarity
        self.new = np.array([row["new"] for row in kept[BASELINE]])
        self.right = {mode: found[mode].scores for mode in (BASELINE, *MODES)}
        self.tokens = {mode: np.array([row["tokens"] for row in kept[mode]]) for mode in (BASELINE, *MODES)}
        self.steps = {mode: np.array([row["steps"] for row in kept[mode]]) for mode in (BASELINE, *MODES)}

    def gated(self, mode: str, cut: float | None) -> dict[str, Any]:
        """Return what becomes of a mode that is asked above a cut only; None is below every line."""
        asked = np.ones(len(self.new), bool) if cut is None else self.familiarity > cut
        right, tokens, steps = (
            np.where(asked, part[mode], part[BASELINE]) for part in (self.right, self.tokens, self.steps)
        )
        low, high = accuracy_interval(right)
        pairs = {other: changes(right, self.right[other]) for other in (BASELINE, mode)}
        return {
            "mode": mode, "cut": cut, "asked": float(asked.mean()), "accuracy": float(right.mean()),
            "accuracy_ci95": [low, high],
            "acceptance_length": Counts.of_responses(tokens, steps).acceptance_length,
            "accuracy_seen_lines": float(right[~self.new].mean()), "accuracy_new_lines": float(right[self.new].mean()),
            "paired": pairs,
        }  # fmt: skip

    def about(self) -> dict[str, float]:
        """Return how well familiarity tells lines apart."""
        helped = {mode: self.right[mode] - self.right[BASELINE] for mode in MODES}
        told = {
            f"auc, {mode}: gained against lost": auc(self.familiarity[change != 0], change[change != 0] > 0)
            for mode, change in helped.items()
        }
        return {
            "num_lines": float(len(self.new)),
            "auc, seen against new lines": auc(self.familiarity, ~self.new),
        } | told


def main(
    calibration: Annotated[Path, typer.Option(help="Answers to calibration lines.")],
    test: Annotated[Path, typer.Option(help="Answers to test lines.")],
    pair: Annotated[Path | None, typer.Option(help="Directory with target/ and draft/; the cache by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Choose a cut on calibration lines, and say what it makes of the test lines."""
    from transformers import AutoModelForCausalLM

    pair = pair or cached_pair("code")
    tokenizer = load_tokenizer(str(pair / "target"))
    prompts = {
        work: [tokenizer(problem.prompt, add_special_tokens=False)["input_ids"] for problem in drawn(work)]
        for work in (calibration, test)
    }
    model = AutoModelForCausalLM.from_pretrained(pair / "draft", dtype=torch.bfloat16).eval()
    with progress_bar("reading", sum(map(len, prompts.values()))) as tick:
        found = {work: log_likelihood(model, own, tick) for work, own in prompts.items()}
    tuning, tested = AnsweredLines(calibration, found[calibration]), AnsweredLines(test, found[test])
    cuts = {left: float(np.percentile(tuning.familiarity, left)) if left else None for left in DECILES}
    tried = [tuning.gated(mode, cut) for mode in MODES for cut in cuts.values()]
    best = max(tried, key=lambda row: (row["accuracy"], row["acceptance_length"]))
    ungated = {mode: tested.gated(mode, None) for mode in MODES}
    chosen = tested.gated(best["mode"], best["cut"])
    result: dict[str, Any] = {
        "calibration": {"about": tuning.about(), "tried": tried, "chosen": best},
        "test": {"about": tested.about(), "ungated": ungated, "chosen": chosen},
    }
    print(json.dumps({"calibration": result["calibration"]["chosen"], "test": result["test"]}, indent=1))
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    run_command(main)
