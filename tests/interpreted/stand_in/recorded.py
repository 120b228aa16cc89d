"""Decisions and tokens of every path on a fixed set of cases, held against a committed record of them.

    export TRITON_INTERPRET=1 PYTHONPATH=tests/interpreted/stand_in:tests/support
    python -m recorded [--write] [--statistics FILE]

For what must not change a decision: moving code, making kernels faster. The record holds one digest per case, of the
tokens emitted, the mismatches consulted, what was decided there, and the budgets and overrides counted afterwards;
it is of commit 77dbbf8. Statistics may differ in their last bits from one machine to the next and are no part of a
digest: ``--statistics`` saves them, or compares them with those that another run saved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arbitration_cases as v2_cases
import numpy as np
import torch
import v1_cases

from vllm_cospec.kernels.policies import Learned
from vllm_cospec.runners import v1_cpu, v1_gpu

RECORD = Path(__file__).parents[1] / "recorded_decisions.json"
V2_SEEDS = range(4)
V1_SEEDS = range(16)

Answer = tuple[str, int, Any, list[list[float]]]
"""Name of a case, its blocks, what was decided and emitted, the statistics of the mismatches consulted."""


def v2(seeds: range = V2_SEEDS) -> Iterator[Answer]:
    """Model Runner V2: every policy and regime, greedy and sampled, with and without a trace."""
    network = v2_cases.arbiter(32, 32)
    for name, policy in v2_cases.POLICIES.items():
        for regime in v2_cases.REGIMES:
            for seed in seeds:
                k = 5 if seed % 2 == 0 else 1 + (7 * seed + 3 * list(v2_cases.POLICIES).index(name)) % 16
                case = v2_cases.make_case(
                    100 * seed + v2_cases.REGIMES.index(regime), vocab=(111, 2_600)[seed % 4 == 3], k=k,
                    regime=regime, requests=6, dtype=(torch.float32, torch.bfloat16)[seed // 2 % 2], agreement=0.4,
                    separate=seed % 3 == 1 or regime == "nan", draft_logits=seed % 4 != 2 or policy.needs_draft_logits,
                )  # fmt: skip
                collect = seed % 2 == 0
                got, counters, slots = case.ours(policy, network, collect=collect)
                tokens = [
                    row[:count] for row, count in zip(got.sampled.tolist(), got.num_sampled.tolist(), strict=True)
                ]
                decided, statistics = [], []
                if got.trace is not None:
                    decided = got.trace.action.tolist()
                    statistics = got.trace.statistics[got.trace.action >= 0].tolist()
                what = [tokens, decided, counters[:k].tolist(), slots.overrides_so_far.tolist()]
                yield f"v2 {name} {regime} {seed}", len(tokens), what, statistics


def v1(module: Any, seeds: range = V1_SEEDS) -> Iterator[Answer]:
    """Model Runner V1, on the CPU or through the kernels: four steps of five requests that change places."""
    with tempfile.TemporaryDirectory() as scratch:
        artefact = v1_cases.save_arbiter(Path(scratch) / "arbiter")
        for name, rule in v1_cases.POLICIES.items():
            policy = rule or Learned(artefact=artefact)
            for sampled in (0.0, 0.6):
                directory = Path(scratch) / f"{name} {sampled}"
                runner, sampler = v1_cases.installed(module, policy, directory, v1_cases.IDS, v1_cases.EXTRA)
                for seed in seeds:
                    ids = [v1_cases.IDS[(i + seed) % len(v1_cases.IDS)] for i in range(len(v1_cases.IDS))]
                    step = v1_cases.Step(10 * seed + int(10 * sampled), ids, sampled, probabilities=seed % 3 != 2)
                    tokens = runner.run(sampler, step).tolist()
                    decisions = sorted(sampler.take_decisions(), key=lambda d: (d.request_id, d.output_position))
                    what = [
                        tokens, [[d.request_id, d.output_position, d.block_position, d.kept] for d in decisions]
                    ]  # fmt: skip
                    path = module.__name__.rpartition(".")[2]
                    statistics = [d.statistics.tolist() for d in decisions]
                    yield f"{path} {name} {sampled} {seed}", len(tokens), what, statistics


def everything() -> Iterator[Answer]:
    """Every case of every path."""
    from vllm.distributed import parallel_state

    parallel_state.get_tp_group = lambda: SimpleNamespace(is_first_rank=True)  # type: ignore[assignment,return-value]
    yield from v1(v1_cpu)
    yield from v1(v1_gpu)
    yield from v2()


def digest(what: Any) -> str:
    """Eight hex digits over what was decided."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]


def compare_statistics(path: Path, now: dict[str, list[list[float]]]) -> None:
    """Save the statistics, or say how far they are from those of another run."""
    flat = {name: np.array(rows, np.float32).reshape(-1, 16) for name, rows in now.items()}
    if not path.exists():
        np.savez_compressed(path, **flat)  # type: ignore[arg-type]
        return
    with np.load(path) as before:
        same = [name for name in flat if name in before and before[name].shape == flat[name].shape]
        gaps = np.concatenate([np.abs(before[name] - flat[name]) for name in same])
        size = np.concatenate([np.abs(before[name]) for name in same])
    print(
        f"statistics of {len(gaps)} mismatches: {int((gaps != 0).any(1).sum())} differ, at most by "
        f"{gaps.max():.1e}, relative to max(1, value) by {(gaps / np.maximum(size, 1)).max():.1e}; "
        f"{len(flat) - len(same)} cases consulted others"
    )


def main() -> int:
    """Write the record or hold this code against it; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the record")
    parser.add_argument("--statistics", type=Path, help="save the statistics there, or compare with what is there")
    options = parser.parse_args()
    blocks, digests, statistics = 0, {}, {}
    for name, count, what, rows in everything():
        blocks += count
        digests[name], statistics[name] = digest(what), rows
    if options.statistics:
        compare_statistics(options.statistics, statistics)
    if options.write:
        RECORD.write_text(json.dumps({"commit": "77dbbf8", "blocks": blocks, "cases": digests}, indent=0) + "\n")
        return 0
    recorded = json.loads(RECORD.read_text())["cases"]
    changed = sorted(name for name in recorded if recorded[name] != digests.get(name))
    new = len(digests.keys() - recorded.keys())  # of policies that came after the record
    print(f"{blocks} blocks in {len(digests)} cases, {len(changed)} decided otherwise, {new} not recorded")
    print(*(f"  {name}" for name in changed), sep="\n", end="")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
