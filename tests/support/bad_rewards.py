"""Rewards that do not do what they should, for answers that say so."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def misbehave(problem: Any, text: str) -> Any:
    """Do what the text says; the score of any other text is its length."""
    if text == "raise":
        raise KeyError("gold")
    if text == "hang":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                continue
    if text == "compute":
        return float(9**9**9)  # one long calculation that hears no signal
    if text == "exit":
        os._exit(3)
    if text == "crash":
        ctypes.string_at(0)
    if text == "memory":
        return float(len(bytearray(1 << 40)))
    if text == "print":
        print("noise", flush=True)
    return {"nan": float("nan"), "text": "good", "none": None}.get(text, float(len(text)))


def process(problem: Any, text: str) -> float:
    """The process this is graded in."""
    return float(os.getpid())


def litter(problem: Any, text: str) -> Any:
    """Write into the directory for temporary files, and misbehave."""
    Path(tempfile.gettempdir(), "litter").write_text(text)
    return misbehave(problem, text)
