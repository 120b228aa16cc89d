"""What a person sees of a run: a progress bar, TensorBoard, one JSON line per update, plots at the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from vllm_cospec.atomic import write_text
from vllm_cospec.training.measure.plots import plot_curves
from vllm_cospec.training.progress import shows_bars
from vllm_cospec.training.rollout.episodes import Episodes

LOG_FILE, HELD_OUT_FILE, TENSORBOARD = "metrics.jsonl", "held_out.jsonl", "tensorboard"


class Report:
    """Use as a context manager around a run."""

    def __init__(self, output: Path, updates: int, done: int, console: Console | None = None):
        """Open the logs.

        Args:
            output: the run's directory.
            updates: of the whole run.
            done: how many a checkpoint holds already; later lines of an earlier attempt are dropped.
            console: where to show progress; standard error by default.
        """
        self._log, self._held_out = output / LOG_FILE, output / HELD_OUT_FILE
        for path in (self._log, self._held_out):
            _write_lines(path, [line for line in _read_lines(path) if line["update"] <= done])
        self._writer = SummaryWriter(str(output / TENSORBOARD), purge_step=done + 1)
        self._console = console or Console(stderr=True)
        self._updates, self._done, self._rollouts = updates, done, 0
        self._progress = Progress(
            TextColumn("update"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), console=self._console, disable=not shows_bars(self._console),
        )  # fmt: skip

    def __enter__(self) -> Report:
        self._progress.start()
        self._bar = self._progress.add_task("update", total=self._updates, completed=self._done, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._writer.close()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, responses: int) -> None:
        """Show that responses have arrived."""
        self._rollouts += responses
        if not self._progress.tasks[0].fields["figures"]:
            self._progress.update(self._bar, figures=f"{self._rollouts} responses")

    def update(self, iteration: int, metrics: dict[str, float]) -> None:
        """Record an update's figures."""
        line = {"update": iteration + 1, **{k: round(v, 6) if math.isfinite(v) else None for k, v in metrics.items()}}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration + 1)
        figures = (
            f"accuracy {metrics['accuracy']:.3f}  acceptance length {metrics['acceptance_length']:.2f}  "
            f"override rate {metrics['override_rate']:.2f}  loss {self._loss(metrics)}  "
            f"{metrics['rollouts_per_s']:.0f} rollouts/s"
        )
        self._progress.update(self._bar, completed=iteration + 1, figures=figures)
        if not self._console.is_terminal:
            self.say(f"update {iteration + 1}/{self._updates}  {figures}")

    def held_out(self, update: int, episodes: Episodes) -> None:
        """Record how the weights of an update did on the held-out problems."""
        line = {
            "update": update,
            "accuracy": float(episodes.reward.mean()) if len(episodes.reward) else 0.0,
            "acceptance_length": episodes.acceptance_length,
            "problems": len(episodes.reward),
        }
        earlier = [other for other in _read_lines(self._held_out) if other["update"] != update]
        _write_lines(self._held_out, [*earlier, line])
        self._writer.add_scalar("held_out/accuracy", line["accuracy"], update)
        self._writer.add_scalar("held_out/acceptance_length", line["acceptance_length"], update)
        self.say(
            f"update {update} on {line['problems']} held-out problems: accuracy {line['accuracy']:.3f}, acceptance "
            f"length {line['acceptance_length']:.2f}"
        )

    @staticmethod
    def _loss(metrics: dict[str, float]) -> str:
        """The loss of this update; while labels for the warm start are collected there is none."""
        loss = metrics.get("loss", metrics.get("warm_start_loss"))
        return "-" if loss is None else f"{loss:+.4f}"


def read_log(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a last line that was cut off is left out."""
    return _read_lines(output / LOG_FILE)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def plot_learning(output: Path) -> Path:
    """Draw a run's learning curves into ``learning.png``; returns its path."""
    panels = {
        "accuracy": "accuracy while sampling actions",
        "acceptance_length": "acceptance length",
        "override_rate": "override rate",
        "entropy": "policy entropy (nats)",
    }
    return plot_curves(output / "learning.png", {"": read_log(output)}, panels, ("update", "update"))
