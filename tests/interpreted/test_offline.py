"""The kernels compile for GPUs that are not here without spilling, and the committed report is of these kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REPORT = BENCHMARKS / "results" / "kernel_offline.json"
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
REPORTED = {"sm_90", "gfx942"}
# Those that need the most registers, and those that ptxas spilled for a while, each on another target.
WORST = (
    "target_statistics_kernel: bf16, processed fp32, draft logits, top 3",
    "target_statistics_kernel: fp32, draft logits",
    "target_statistics_kernel: fp32, processed fp32, draft logits",
    "mismatch_kernel: ",
    "verdict_kernel: fp32, processed fp32, draft logits, top 3",
    "scan_kernel: bf16, draft logits, typical, collect",
    "scan_kernel: fp16, draft logits, learned, 32x32, collect",
    "scan_kernel: fp32, draft logits, kl",
    "given_verdict_kernel: bf16, sampled",
)
BESIDE_THE_DRAFT = "mismatch_kernel", "bf16, draft logits"
LIST = """
from vllm_cospec.kernels.triton.stand_in import install
install()
import json
from benchmarks import kernel, variants
launches = variants.launches(kernel.VOCAB_SIZE, kernel.NUM_DRAFT_TOKENS, variants.REPORTED)
print(json.dumps([f"{one.name}: {variant}" for variant, one in launches]))
"""


WIDEST = """
from vllm_cospec.kernels.triton.stand_in import install
install()
import sys
import torch
from benchmarks import kernel, offline, variants
from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels.policies import Learned
from vllm_cospec.kernels.triton.launch import ServerShapes, warm_up
from vllm_cospec.kernels.triton.policies import compile_policy
cpu, steps = torch.device("cpu"), kernel.NUM_DRAFT_TOKENS
logits = torch.empty(1, steps, kernel.VOCAB_SIZE, dtype=torch.bfloat16)
server = ServerShapes(kernel.VOCAB_SIZE, torch.bfloat16, logits, steps, cpu, counts_scores=True)
for hidden in ((64, 64), (256, 256)):
    with variants.tuned(sys.argv[1]), offline.recorded_launches(*variants.MODULES) as launches:
        warm_up(server, compile_policy(Learned(artefact="-"), cpu, Arbiter(hidden)))
    scan = next(one for one in launches if one.name == "scan_kernel")
    print(offline.compile_launch(scan, sys.argv[1]).spill_bytes)
"""


@pytest.mark.parametrize("target", sorted(REPORTED))
def test_the_scan_compiles_without_spilling_with_the_largest_networks(target: str) -> None:
    """A second layer that just fits the registers, and one that is read in parts."""
    command = [sys.executable, "-c", WIDEST, target]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["0", "0"]


@pytest.mark.timeout(900)
def test_the_worst_variants_compile_for_every_target_without_spilling(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    only = [word for text in WORST for word in ("--only", text)]
    command = [sys.executable, str(BENCHMARKS / "kernel.py"), "--no-cpu", "--json", str(report), *only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(report.read_text())["offline"]
    assert {row["target"] for row in rows} == TARGETS
    names = {f"{row['kernel']}: {row['variant']}" for row in rows}
    assert all(any(text in name for name in names) for text in WORST)
    assert [row for row in rows if row["spill_bytes"]] == []


@pytest.mark.slow  # checks a committed file
def test_the_committed_report_covers_every_variant_and_none_spills() -> None:
    rows = json.loads(REPORT.read_text())["offline"]
    done = subprocess.run(
        [sys.executable, "-c", LIST], cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched = json.loads(done.stdout.splitlines()[-1])
    assert len(set(launched)) == len(launched), "two variants share a name"
    assert {row["target"] for row in rows} == REPORTED
    for target in REPORTED:
        assert sorted(f"{r['kernel']}: {r['variant']}" for r in rows if r["target"] == target) == sorted(launched)
    assert [row for row in rows if row["spill_bytes"] and not row["kernel"].startswith("_")] == []


@pytest.mark.slow  # checks a committed file
def test_the_passes_over_the_vocabulary_load_128_bits_at_a_time() -> None:
    rows = json.loads(REPORT.read_text())["offline"]
    passes = [row for row in rows if row["kernel"] in ("target_statistics_kernel", "mismatch_kernel")]
    assert {row["target"] for row in passes} == REPORTED
    for row in passes:
        loads = {int(width): int(count) for count, _, width in (part.partition("x") for part in row["loads"].split())}
        assert loads[128] >= 1, row
        # a single logit, the draft token's, in one of its rows; nothing else is narrower than an integer
        single = row["variant"].endswith("rank") or (row["kernel"], row["variant"]) == BESIDE_THE_DRAFT
        assert sum(count for width, count in loads.items() if width < 32) <= single, row


@pytest.mark.slow  # checks a committed file
def test_the_first_pass_takes_few_enough_instructions_to_be_bound_by_memory() -> None:
    """64 logits a thread of a greedy row in bfloat16; the sampled branch is not in this variant."""
    wanted = ("target_statistics_kernel", "bf16, given verdict", "sm_90")
    rows = json.loads(REPORT.read_text())["offline"]
    (row,) = (row for row in rows if (row["kernel"], row["variant"], row["target"]) == wanted)
    assert row["instructions"] < row["executed"] <= 1_100


@pytest.mark.slow  # checks a committed file
def test_the_committed_measurement_on_the_cpu_stays_within_its_bound() -> None:
    rows = json.loads((BENCHMARKS / "results" / "kernel_cpu.json").read_text())["cpu"]
    large = [row for row in rows if row["vocab"] == 151_936]
    assert {row["batch"] for row in large} == {8, 32}
    for row in large:
        assert (row["num_draft_tokens"], row["agreement"]) == (5, 0.7)
        assert row["ratio"] <= 1.25
        assert row["floor_ms"] > 0


@pytest.mark.slow  # checks a committed file
def test_decisions_take_at_most_a_millisecond_of_a_step_in_a_running_engine() -> None:
    report = json.loads((BENCHMARKS / "results" / "in_place.json").read_text())
    assert (report["batch"], report["num_speculative_tokens"]) == (16, 7)
    for mode in ("learned", "relaxed_topk"):
        assert report[mode]["steps"] >= 50
        assert report["stock"]["median_ms"] < report[mode]["median_ms"] <= 1.0
