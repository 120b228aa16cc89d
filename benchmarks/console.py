"""The console that the benchmarks print their tables to."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Return a console whose tables stay whole when they go to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 150))
