"""An independent check of the code pair's figures: the arbiter's decisions, replayed by transformers alone.

Imports nothing of this project. Each line of FILE names a line of an installed package by path, number and cut, and
the places in the completion where the arbiter kept the draft's token. There the draft's most probable token is taken,
elsewhere the target's; the first line of the completion is compared with the package's own.

    python benchmarks/code/replay.py FILE PAIR [--package vllm] [--problems 200] [--dtype float32]
"""

import argparse
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

MAX_TOKENS = 48


@torch.inference_mode()
def complete(models: list[Any], ids: list[int], overrides: set[int], ends: set[int]) -> list[int]:
    """Return the completion's tokens: the draft's (models[1]) at the places in overrides, else the target's."""
    tokens: list[int] = []
    caches: list[Any] = [None, None]
    given = torch.tensor([ids])
    while len(tokens) < MAX_TOKENS:
        best = []
        for i, model in enumerate(models):
            out = model(input_ids=given, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = out.past_key_values
            best.append(int(out.logits[0, -1].argmax()))
        tokens.append(best[len(tokens) in overrides])
        if tokens[-1] in ends:
            break
        given = torch.tensor([tokens[-1:]])
    return tokens


def main() -> None:
    """Replay and print the accuracy beside the recorded one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="answers of one mode, .jsonl or .jsonl.gz")
    parser.add_argument("pair", type=Path, help="directory with target/ and draft/")
    parser.add_argument("--package", default="vllm")
    parser.add_argument("--problems", type=int, help="only the first so many")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="as FILE was recorded")
    options = parser.parse_args()
    data = options.file.read_bytes()
    text = (gzip.decompress(data) if options.file.suffix == ".gz" else data).decode()
    rows = [json.loads(line) for line in text.splitlines()][: options.problems]
    spec = importlib.util.find_spec(options.package)
    if spec is None or spec.origin is None:
        parser.error(f"--package: {options.package!r} is not installed")
    root = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(options.pair / "target")
    ends = set(GenerationConfig.from_pretrained(options.pair / "target").eos_token_id)
    models = [
        AutoModelForCausalLM.from_pretrained(options.pair / role, dtype=getattr(torch, options.dtype)).eval()
        for role in ("target", "draft")
    ]
    right = same = 0
    for row in rows:
        lines = (root / row["path"]).read_text().split("\n")
        line = lines[row["line"] - 1].rstrip()
        prompt = "".join(before + "\n" for before in lines[row["first"] - 1 : row["line"] - 1]) + line[: row["cut"]]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens = complete(models, ids, set(row["overrides_at"]), ends)
        found = str(tokenizer.decode(tokens, skip_special_tokens=True)).partition("\n")[0].strip()
        right += found == line[row["cut"] :].strip()
        same += (found == line[row["cut"] :].strip()) == row["right"]
    recorded = sum(row["right"] for row in rows)
    print(json.dumps({"problems": len(rows), "replayed": right, "recorded": recorded, "same_verdict": same}))


if __name__ == "__main__":
    main()
