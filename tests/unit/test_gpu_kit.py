"""What the kit for a GPU computes without one: which parts run, what counts as a problem, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import benchmark

from vllm_cospec.errors import ConfigError

engine, report, sanitize = benchmark("gpu.engine"), benchmark("gpu.report"), benchmark("gpu.sanitize")
kit, processes = benchmark("gpu.__main__"), benchmark("gpu.processes")


def findings(**changes: Any) -> dict[str, Any]:
    return {
        "answers": 2, "runner": "vllm.v1.worker.gpu.model_runner", "strict_same_as_stock": 2,
        "learned_same_as_on_a_cpu": 1, "learned_same_as_stock": 0, "overrides": 5, "compiled_while_serving": [],
        "verifications_that_did_not_wait": 9, **changes,
    }  # fmt: skip


def comparison(**changes: Any) -> dict[str, Any]:
    return {
        "batches": 3, "requests": 12, "too_close_to_call": 1, "differences": 0, "first_differences": [],
        "cut_short": False, **changes,
    }  # fmt: skip


def test_parts_run_in_one_order_and_share_the_time() -> None:
    assert kit.chosen("times, kernels") == ["kernels", "times"]
    assert sum(kit.PARTS.values()) == pytest.approx(1)
    with pytest.raises(ConfigError, match="'speed' is no part; choose from kernels, times, engine, sanitizer"):
        kit.chosen("kernels,speed")
    with pytest.raises(ConfigError, match="--parts: names no part"):
        kit.chosen(" , ")


def test_work_is_spread_over_processes_and_comes_back_in_order() -> None:
    assert processes.spread(kit.chosen, ["times", "kernels,engine"], 2) == [["times"], ["kernels", "engine"]]
    assert processes.spread(kit.chosen, ["times"], 1) == [["times"]]
    assert 1 <= processes.available() <= 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="needs a GPU, and torch finds neither CUDA nor ROCm"):
        kit.gpu()


def test_differences_and_empty_comparisons_are_problems() -> None:
    assert kit.wrong({"strict against stock": comparison()}) == []
    different = comparison(differences=2, first_differences=["x: tokens", "y"])
    assert kit.wrong({"a": different, "b": comparison(requests=0)}) == [
        "a: 2 differences, the first: x: tokens",
        "b: nothing was compared",
    ]


def test_an_engine_is_judged_by_stock_and_by_the_recorded_answers() -> None:
    seen = {"runner": "r", "compiled_while_serving": [], "verifications_that_did_not_wait": 0}
    found = {
        "stock": {**seen, "tokens": [[1, 2], [3]]},
        "strict": {**seen, "tokens": [[1, 2], [4]], "verifications_that_did_not_wait": 3},
        "learned": {**seen, "tokens": [[1], [3]], "overrides": 1, "compiled_while_serving": ["scan_kernel"]},
    }
    for mode in found.values():
        mode["layers"] = "vLLM's"
    judged = engine.judge(found, [[1], [5]])
    assert judged["answers"] == 2
    assert judged["strict_same_as_stock"] == 1
    assert judged["learned_same_as_on_a_cpu"] == 1
    assert judged["learned_same_as_stock"] == 1
    assert engine.problems({"V2": judged, "V1": findings()}) == [
        "engine on V2: strict gave other answers than stock to 1 prompts",
        "engine on V2: compiled while serving: scan_kernel",
    ]


def test_a_sound_engine_has_no_problems_and_a_failed_one_says_why() -> None:
    assert engine.problems({"V1": findings(), "V2": findings()}) == []
    assert engine.problems({"V1": findings(verifications_that_did_not_wait=0)}) == [
        "engine on V1: no step was verified on the device"
    ]
    assert engine.problems({"V2": {"failed": "strict: no answers within 50 s"}}) == [
        "engine on V2: strict: no answers within 50 s"
    ]


def test_an_engine_that_fails_leaves_the_other_runner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = json.loads(engine.RECORD.read_text())["tokens"]

    def answer(mode: str, on_device: bool, timeout: float, runner: str) -> dict[str, Any]:
        assert on_device
        if (mode, runner) == ("strict", "V2"):
            raise RuntimeError("strict: no memory")
        return {"tokens": recorded, "runner": runner, "layers": "vLLM's", "compiled_while_serving": [],
                "verifications_that_did_not_wait": 3}  # fmt: skip

    monkeypatch.setattr(engine, "in_its_own_process", answer)
    found = engine.measure(5.0)
    assert found["V2"] == {"failed": "strict: no memory"}
    assert (found["V1"]["runner"], found["V1"]["strict_same_as_stock"]) == ("V1", len(recorded))


def test_the_recorded_answers_are_of_the_prompts_that_are_asked() -> None:
    recorded = json.loads(engine.RECORD.read_text())
    assert len(recorded["tokens"]) == len(engine.prompts()) == engine.NUM_PROMPTS
    assert recorded["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert all(0 < len(tokens) <= engine.MAX_TOKENS for tokens in recorded["tokens"])


def test_only_our_kernels_are_counted_as_compiled() -> None:
    compiled = engine.Compiled()
    compiled.note(SimpleNamespace(module="vllm_cospec.kernels.triton.scan", name="scan_kernel"))
    compiled.note(SimpleNamespace(module="vllm.v1.sample", name="theirs"))
    compiled.note(None)
    assert compiled.names == ["scan_kernel"]


def test_every_verification_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def verify(text: str) -> str:
        modes.append(text)
        return "done"

    module = SimpleNamespace(verify=verify)
    monkeypatch.setitem(sys.modules, "a_runner", module)
    steps = engine.guard((("a_runner", "verify"), ("not_imported", "verify")))
    assert module.verify("verified") == "done"
    assert modes == ["error", "verified", "default"]
    assert len(steps) == 1


def tool(directory: Path, text: str) -> str:
    """An executable in the place of compute-sanitizer."""
    path = directory / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_the_sanitizer_finds_is_told(tmp_path: Path) -> None:
    clean = tool(tmp_path, f'echo "$@" > {tmp_path}/arguments')
    assert sanitize.check(clean, "memcheck", 6) == "clean"
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("--tool memcheck --error-exitcode 86 ")
    assert arguments.strip().endswith("-m benchmarks.gpu --parts kernels --repetitions 1 --workers 1 --minutes 0.1")
    found = tool(tmp_path, 'echo "========= Invalid __global__ read"; echo other; exit 86')
    assert sanitize.check(found, "racecheck", 6) == "exit code 86: ========= Invalid __global__ read"
    assert sanitize.problems({"memcheck": "clean", "racecheck": "exit code 86: x"}) == ["racecheck: exit code 86: x"]


def test_a_machine_without_the_sanitizer_skips_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    skipped = sanitize.measure(10)
    assert skipped == {"skipped": "compute-sanitizer is not installed"}
    assert sanitize.problems(skipped) == []


def test_the_report_has_a_table_per_part() -> None:
    row = {
        "vocab": 151_936, "batch": 64, "draws": "greedy", "what": "learned", "device_us": 85.4, "of_stock": 1.5,
        "of_read": 2.0, "host_us": 120.0, "kept_of_mismatches": None, "stages_us": {"scan_kernel": 7.25},
    }  # fmt: skip
    text = report.markdown(
        {
            "device": {"name": "A Card", "architecture": "sm_90"}, "parts": ["kernels"], "minutes": 9.5,
            "kernels": {"run to run": comparison(cut_short=True)},
            "times": {"rows": [row], "left_out": [[32_000, 8, "sampled"]]},
            "engine": {"V2": findings()}, "sanitizer": {"memcheck": "clean"}, "problems": ["a | b"],
        }
    )  # fmt: skip
    assert text.startswith("# Verification on A Card\n")
    assert "| run to run | 3 | 12 | 1 | 0 | yes |" in text
    assert "| 151,936 | 64 | greedy | learned | 85 | 1.50 | 2.00 | 120 | - |" in text
    assert "| 151,936 | 64 | greedy | learned | scan_kernel | 7.25 |" in text
    assert "Not timed, because the time was up: 32000/8/sampled." in text
    assert "## Engine with the bundled pair, V2\n" in text
    assert "| compiled while serving | none |" in text
    assert "| memcheck | clean |" in text
    assert text.endswith("## Problems\n\n- a | b\n")
