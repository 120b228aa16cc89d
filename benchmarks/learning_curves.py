"""Learning curves of several runs over the number of tokens they generated.

python benchmarks/learning_curves.py branch=runs/branch group=runs/group --plot docs/learning_curves.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from vllm_cospec.training.measure.report import read_log


def main(
    runs: Annotated[list[str], typer.Argument(help="LABEL=DIRECTORY of each run.")],
    plot: Annotated[Path, typer.Option(help="The PNG to write.")],
) -> None:
    """Draw accuracy and acceptance length of the rollouts, with sampled actions."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for run in runs:
        label, _, directory = run.partition("=")
        lines = read_log(Path(directory))
        if not lines:
            raise typer.BadParameter(f"{run!r}: no metrics.jsonl there; write LABEL=DIRECTORY of a run")
        millions = [line["generated_tokens"] / 1e6 for line in lines]
        for axes, name in zip(panels, ("accuracy", "acceptance_length"), strict=True):
            axes.plot(millions, [line[name] for line in lines], label=label)
            axes.set(xlabel="generated tokens (millions)", ylabel=name.replace("_", " "))
            axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(plot, dpi=100)


if __name__ == "__main__":
    typer.run(main)
