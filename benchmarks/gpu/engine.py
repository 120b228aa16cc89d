"""A whole engine with the bundled pair: strict parity, the arbiter's answers, nothing compiled or waited for.

    python -m benchmarks.gpu.engine            # on a CPU: record the answers that a GPU's are compared with

Every engine has a process of its own: the part that runs there is :func:`answer`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import vllm_cospec.demo
from vllm_cospec.parent import end_with
from vllm_cospec.training.measure.provenance import write_result

BUNDLED = Path(vllm_cospec.demo.__file__).parent
RECORD = Path(__file__).resolve().parents[1] / "results" / "gpu_answers.json"
"""Answers of Model Runner V1 on a CPU, in float32."""
K, NUM_PROMPTS, MAX_TOKENS = 7, 16, 60
_DRAFT = {"model": str(BUNDLED / "draft"), "num_speculative_tokens": K}
MODES: dict[str, dict[str, Any]] = {
    "stock": {"method": "draft_model", "draft_sample_method": "probabilistic", **_DRAFT},
    "strict": {"method": "cospec", "arbiter": {"policy": "strict"}, **_DRAFT},
    "learned": {"method": "cospec", "arbiter": str(BUNDLED / "arbiter"), **_DRAFT},
}
RUNNERS = {"V2": "1", "V1": "0"}
"""Model runners of vLLM, and what they are chosen by in VLLM_USE_V2_MODEL_RUNNER."""
_OURS = "vllm_cospec"
_ENTRIES = (("vllm_cospec.runners.v2", "arbitrate"), ("vllm_cospec.runners.v1_gpu", "arbitrate_given"))


class Compiled:
    """Counts our kernels as Triton compiles them, in this process."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def watch(self) -> None:
        """Begin."""
        from triton import knobs

        before = knobs.runtime.jit_post_compile_hook

        def hook(*args: Any, **kwargs: Any) -> Any:
            self.note(kwargs.get("fn"))
            return before(*args, **kwargs) if before is not None else None

        knobs.runtime.jit_post_compile_hook = hook

    def note(self, function: Any) -> None:
        """Take down a kernel, should it be one of ours; ``function`` is what Triton tells of it."""
        if str(getattr(function, "module", "")).startswith(_OURS):
            self.names.append(str(getattr(function, "name", "a kernel")))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Have torch raise where the host would wait for the device."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def guard(entries: tuple[tuple[str, str], ...] = _ENTRIES) -> list[int]:
    """Put :func:`no_waiting` around every verification from now on; returns a list that grows by one with each."""
    steps: list[int] = []

    def guarded(verify: Any) -> Any:
        def call(*args: Any) -> Any:
            steps.append(1)
            with no_waiting():
                return verify(*args)

        return call

    for name, entry in entries:
        module = sys.modules.get(name)
        if module is not None:
            setattr(module, entry, guarded(getattr(module, entry)))
    return steps


def prompts() -> list[str]:
    """Return held-out problems of the bundled pair's task."""
    from vllm_cospec.training.tasks import load_task

    return [problem.prompt for problem in load_task("demo").problems(seed=5, n=NUM_PROMPTS)]


def without_compiled_modules() -> dict[str, Any]:
    """Return the options of an engine that needs none of vLLM's compiled modules, or nothing where they are there.

    Such an engine takes attention from Triton and its layers from PyTorch. Sampling, drafting and verification are
    Triton's in any case.
    """
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not current_platform.is_cuda() or hasattr(torch.ops._C, "rms_norm"):
        return {}
    return {
        "attention_config": {"backend": "TRITON_ATTN"},
        "compilation_config": {"custom_ops": ["none"]},
        "kernel_config": {"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}},
    }


def answer(mode: str, on_device: bool) -> dict[str, Any]:
    """Let one engine answer the prompts, greedily; returns tokens and what was seen meanwhile."""
    compiled = Compiled()
    if on_device:
        compiled.watch()
    from vllm import LLM, SamplingParams

    pure = without_compiled_modules() if on_device else {}
    shared: dict[str, Any] = {"gpu_memory_utilization": 0.1} if on_device else {}  # engines run side by side
    llm = LLM(
        str(BUNDLED / "target"), speculative_config=MODES[mode], dtype="float32", max_model_len=128, max_num_seqs=64,
        kv_cache_memory_bytes=2**28, enforce_eager=True, enable_prefix_caching=False, seed=0,
        **shared, **pure,
    )  # fmt: skip
    warm = len(compiled.names)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    steps = guard() if on_device else []
    outputs = llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    found: dict[str, Any] = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "runner": type(worker.model_runner).__module__,
        "compiled_while_serving": compiled.names[warm:],
        "verifications_that_did_not_wait": len(steps),
        "layers": "PyTorch's and Triton's" if pure else "vLLM's",
    }
    sampler = getattr(worker, "cospec", None)
    if sampler is not None and on_device:
        found["overrides"] = int(sampler._counters.on_device[:K].sum())
    return found


def in_its_own_process(mode: str, on_device: bool, timeout: float, runner: str | None = None) -> dict[str, Any]:
    """Run :func:`answer` in a new process, on the model runner of that name or on the one that vLLM chooses.

    Raises:
        RuntimeError: the process failed, with the end of what it printed, or took longer than ``timeout`` seconds.
    """
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if runner is not None:
        environment["VLLM_USE_V2_MODEL_RUNNER"] = RUNNERS[runner]
    with tempfile.TemporaryDirectory(prefix="cospec-gpu-") as scratch:
        out = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.gpu.engine", mode, str(int(on_device)), str(out)]
        try:
            done = subprocess.run(
                command, cwd=Path(__file__).resolve().parents[2], env=environment, timeout=timeout,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{mode}: no answers within {timeout:.0f} s") from None
        if done.returncode != 0 or not out.exists():
            raise RuntimeError(f"{mode}: the engine failed: {done.stdout[-1500:]}")
        return dict(json.loads(out.read_text()))


def same_answers(answers: list[list[int]], others: list[list[int]]) -> int:
    """Count the answers that are the same to the last token."""
    return sum(one == other for one, other in zip(answers, others, strict=True))


def judge(found: dict[str, dict[str, Any]], recorded: list[list[int]]) -> dict[str, Any]:
    """Return what the engines' answers show.

    Args:
        found: by mode, what :func:`answer` returned.
        recorded: the learned policy's answers on a CPU.
    """
    learned = found["learned"]["tokens"]
    return {
        "answers": len(recorded),
        "runner": found["learned"]["runner"],
        "layers": found["learned"]["layers"],
        "strict_same_as_stock": same_answers(found["strict"]["tokens"], found["stock"]["tokens"]),
        "learned_same_as_on_a_cpu": same_answers(learned, recorded),
        "learned_same_as_stock": same_answers(learned, found["stock"]["tokens"]),
        "overrides": found["learned"].get("overrides"),
        "compiled_while_serving": [name for mode in found.values() for name in mode["compiled_while_serving"]],
        "verifications_that_did_not_wait": sum(mode["verifications_that_did_not_wait"] for mode in found.values()),
    }


def measure(timeout: float) -> dict[str, dict[str, Any]]:
    """Run the engines side by side; returns for every runner :func:`judge`'s findings, or what went wrong."""
    recorded = json.loads(RECORD.read_text())["tokens"]
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor() as pool:
        runs = {
            runner: {mode: pool.submit(in_its_own_process, mode, True, timeout, runner) for mode in MODES}
            for runner in RUNNERS
        }
        for runner, modes in runs.items():
            try:
                found[runner] = judge({mode: run.result() for mode, run in modes.items()}, recorded)
            except RuntimeError as error:
                found[runner] = {"failed": str(error)}
    return found


def problems(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return what must not be so, in sentences."""
    return [text for runner, findings in found.items() for text in _problems(f"engine on {runner}", findings)]


def _problems(name: str, findings: dict[str, Any]) -> list[str]:
    """Answers may differ from a CPU's: another machine rounds otherwise."""
    if "failed" in findings:
        return [f"{name}: {findings['failed']}"]
    found = []
    others = findings["answers"] - findings["strict_same_as_stock"]
    if others:
        found.append(f"{name}: strict gave other answers than stock to {others} prompts")
    if findings["compiled_while_serving"]:
        found.append(f"{name}: compiled while serving: {', '.join(findings['compiled_while_serving'])}")
    if not findings["verifications_that_did_not_wait"]:
        found.append(f"{name}: no step was verified on the device")
    return found


def main() -> None:
    """Answer in one mode for :func:`in_its_own_process`, or, without arguments, record the answers of this CPU."""
    if len(sys.argv) == 4:
        end_with(os.getppid())
        mode, on_device, out = sys.argv[1:]
        Path(out).write_text(json.dumps(answer(mode, on_device == "1")))
        return
    found = in_its_own_process("learned", False, 3600)
    write_result(RECORD, {"schema": 1, "tokens": found["tokens"], "runner": found["runner"]})


if __name__ == "__main__":
    main()
