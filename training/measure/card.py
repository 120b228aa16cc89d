"""The artefact on disk: a trained network with where it comes from, its curve, measured results, and its model card."""

from __future__ import annotations

import datetime
import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, load_artefact, save_artefact
from vllm_cospec.training.artefact import artefact_config
from vllm_cospec.training.config import PairConfig
from vllm_cospec.training.measure.render import markdown_table, named

PACKAGES = ("vllm-cospec", "vllm", "torch", "transformers", "ray")


def save_uncalibrated(
    directory: Path, arbiter: Arbiter, pair: PairConfig, training_config: dict[str, Any], results: dict[str, Any]
) -> None:
    """Write an arbiter with a threshold of 0.5 and no curve."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    config = artefact_config(
        pair, arbiter.hidden_sizes, training_config=training_config, git_sha=git_sha(), packages=packages,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), results=results,
    )  # fmt: skip
    save_artefact(directory, arbiter, config, model_card(config))


def record_results(directory: Path, results: dict[str, Any]) -> None:
    """Write measured results into an artefact and its model card."""
    arbiter, config = load_artefact(directory)
    provenance = config.provenance.model_copy(update={"results": {**config.provenance.results, **results}})
    config = config.model_copy(update={"provenance": provenance})
    save_artefact(directory, arbiter, config, model_card(config))


def model_card(config: ArtefactConfig) -> str:
    """Return the artefact's README."""
    made = config.provenance
    lines = [
        f"# Arbiter for {made.target} with {made.draft}",
        "",
        "Decides, where draft and target of speculative decoding disagree, whose token to keep. For vllm-cospec.",
        "Verification with it is lossy: output can differ from the target's.",
        "",
        f"- Network: 16 - {' - '.join(map(str, config.hidden_sizes))} - 1; threshold {config.threshold:g}.",
        f"- Statistics: {config.schema_id.name} v{config.schema_id.version}"
        f"{'' if config.schema_id.draft_logits else ', without draft logits'}.",
        f"- Vocabulary: {made.vocab_size} tokens, tokenizer {made.tokenizer_hash}.",
        f"- Made {made.created or 'at an unrecorded time'} with "
        f"{', '.join(f'{name} {number}' for name, number in made.packages.items()) or 'unrecorded packages'}.",
    ]
    if config.calibration:
        lines += ["", *_calibration(config)]
    for name, table in made.results.items():
        if isinstance(table, dict) and "modes" in table:
            lines += ["", f"## {name} ({table['problems']})", "", f"`{table['command']}`", ""]
            lines.append(markdown_table(named(table["modes"])))
    if made.training_config:
        lines += ["", "## Training configuration", "", "```json", json.dumps(made.training_config, indent=2), "```"]
    return "\n".join(lines) + "\n"


def _calibration(config: ArtefactConfig) -> list[str]:
    lines = [f"## Calibration ({config.calibration[0].num_problems} problems of the calibration split)", ""]
    said = config.statement
    if said is not None:
        (low, high), k = said.conditions.temperature, said.conditions.num_speculative_tokens
        lines += [
            f"Each threshold loses less than its bound with {said.level:.0%} confidence, on problems like these "
            f"({said.task}) at temperature {low:g}{f' to {high:g}' if high > low else ''}, K = {k}, "
            f"{said.conditions.dtype}, with the same draft and chat template. The statement is about one margin that "
            f"was chosen without looking at the bounds.",
            "",
        ]
    lines += [
        "| threshold | accuracy | difference to target (95 %) | loss below | acceptance length | override rate |",
        "|---|---|---|---|---|---|",
    ]
    for point in config.calibration:
        low, high = point.accuracy_difference_ci95
        lines.append(
            f"| {point.threshold:g} | {point.accuracy:.3f} | {point.accuracy_difference:+.3f} ({low:+.3f} to "
            f"{high:+.3f}) | {'' if point.loss_bound is None else f'{point.loss_bound:.4f}'} | "
            f"{point.acceptance_length:.2f} | {point.override_rate:.2f} |"
        )
    return lines


def git_sha() -> str:
    """Return the commit of this package's source tree, with a mark when it has changes; empty outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )  # fmt: skip
        return found.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
