"""The one progress bar of commands that measure, on standard error, and where a bar can be shown."""

from __future__ import annotations

import importlib.util
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
    console = console or Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not shows_bars(console)) as progress:
        bar = progress.add_task(text, total=total)

        def tick(count: int = 0, text: str | None = None) -> None:
            progress.update(bar, advance=count, description=text)

        yield tick


def shows_bars(console: Console) -> bool:
    """Whether a bar moves there. In a notebook it takes ipywidgets, without which rich would warn with every bar."""
    return not console.is_jupyter or importlib.util.find_spec("ipywidgets") is not None
