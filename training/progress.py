"""The one progress bar of commands that measure, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(text: str, total: int, console: Console | None = None) -> Iterator[Callable[..., None]]:
    """Show how far something is.

    Args:
        text: what is done.
        total: of what is counted.
        console: where it is shown; standard error by default.

    Yields:
        A function to be called with how much has been done, and with another text where that has changed.
    """
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        bar = progress.add_task(text, total=total)

        def tick(count: int = 0, text: str | None = None) -> None:
            progress.update(bar, advance=count, description=text)

        yield tick
