"""Learning curves of several runs over the number of tokens they generated.

python benchmarks/learning_curves.py branch=runs/branch group=runs/group --plot docs/learning_curves.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

if not __package__:  # run as a file: the package is found from the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run
from vllm_cospec.errors import ConfigError
from vllm_cospec.training.measure.plots import plot_curves
from vllm_cospec.training.measure.report import read_log

PANELS = {"accuracy": "accuracy while sampling actions", "acceptance_length": "acceptance length"}


def main(
    runs: Annotated[list[str], typer.Argument(help="LABEL=DIRECTORY of each run.")],
    plot: Annotated[Path, typer.Option(help="The PNG to write.")],
) -> None:
    """Draw accuracy and acceptance length of the rollouts, with sampled actions."""
    found = {}
    for entry in runs:
        label, _, directory = entry.partition("=")
        lines = read_log(Path(directory))
        if not lines:
            raise ConfigError(f"RUNS: {entry!r}: no metrics.jsonl there; write LABEL=DIRECTORY of a run")
        found[label] = [{**line, "millions": line["generated_tokens"] / 1e6} for line in lines]
    plot_curves(plot, found, PANELS, ("millions", "generated tokens (millions)"))


if __name__ == "__main__":
    run(main)
