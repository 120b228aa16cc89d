"""How every benchmark is run: what a user gets wrong is one sentence, help shows whole names, tables stay whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from vllm_cospec.errors import CoSpecError

WIDTH = 150  # of a table that goes to a file
# Plain help: a table would cut long names short.
_PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


def application(main: Callable[..., Any]) -> typer.Typer:
    """Return a function as a command."""
    app = typer.Typer(**_PLAIN)
    app.command()(main)
    return app


def several(description: str | None) -> typer.Typer:
    """Return a command whose parts are added with ``@app.command()``."""
    return typer.Typer(help=description, no_args_is_help=True, **_PLAIN)


def run(command: Callable[..., Any] | typer.Typer) -> None:
    """Run a command with the arguments of the process; ends it with code 1 and one sentence after a known error."""
    try:
        (command if isinstance(command, typer.Typer) else application(command))()
    except (CoSpecError, OSError) as error:
        name = Path(sys.argv[0]).stem
        Console(stderr=True).print(f"{name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def wide_console() -> Console:
    """Return a console whose tables stay whole when they go to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))
