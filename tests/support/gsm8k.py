"""GSM8K's files where they are at hand, else made-up ones of their size and format."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

FILES = Path(os.environ.get("GSM8K_DIRECTORY", "not given"))


def gsm8k(directory: Path) -> Path:
    """Return the directory of GSM8K_DIRECTORY, or ``directory`` with files that are written now."""
    if (FILES / "train.jsonl").exists():
        return FILES
    rng = random.Random(1)
    directory.mkdir()
    for name, count in (("train", 7473), ("test", 1319)):
        lines = []
        for number in range(count):
            a, b = rng.randrange(10_000), rng.randrange(10_000)
            question = f"{name} {number}: Ann has {a} apples and buys {b}. How many has she now?"
            lines.append(json.dumps({"question": question, "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>\n#### {a + b:,}"}))
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory
