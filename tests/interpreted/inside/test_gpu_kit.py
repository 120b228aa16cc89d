"""The kit for a GPU, as far as it runs without one: its comparisons, interpreted, and what it times."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import benchmark

clock, compare, times = benchmark("gpu.clock"), benchmark("gpu.compare"), benchmark("gpu.times")
variants, cases = benchmark("variants"), benchmark("gpu.cases")
generated, timed_case = cases.generated, cases.timed_case
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
# As where vLLM's Python files lie alone: whatever of vLLM is compiled cannot be imported.
WITHOUT_COMPILED_MODULES = """
import importlib.machinery, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("vllm.") and path is not None:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
try:
    import vllm._C
except ModuleNotFoundError:
    import torch
    from benchmarks.gpu import compare, times
    findings = compare.strict_against_stock(torch.device("cpu"), range(1))
    print("COMPARED", findings.requests, findings.differences)
"""


def few() -> Any:
    """Some of the kit's batches: two policies, every regime."""
    return itertools.islice(compare.generated_batches(0), 0, 20)


@pytest.fixture
def wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that emit the wrong tokens."""
    right = generated.arbitrate

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        return replace(result, sampled=result.sampled + 1)

    monkeypatch.setattr(generated, "arbitrate", wrong)


def test_right_kernels_pass() -> None:
    findings = compare.against_reference(few(), CPU)
    assert (findings.batches, findings.differences, findings.cut_short) == (20, [], False)
    assert findings.requests - findings.too_close_to_call >= 60
    strict = compare.strict_against_stock(CPU, range(3))  # one of each vocabulary
    assert (strict.batches, strict.differences) == (3, [])
    assert strict.requests >= 9
    again = compare.run_to_run(CPU, 2, vocab=111)
    assert (again.requests, again.differences) == (32, [])


def test_findings_of_several_processes_are_one() -> None:
    few, cut = compare.Findings(1, 4, 1, ["a"]), compare.Findings(2, 8, 0, ["b"], cut_short=True)
    assert compare.merged([few, cut]) == compare.Findings(3, 12, 1, ["a", "b"], cut_short=True)


@pytest.mark.usefixtures("wrong_tokens")
def test_wrong_kernels_are_told_by_batch_request_and_what_is_wrong() -> None:
    findings = compare.against_reference(itertools.islice(few(), 6), CPU)
    assert findings.differences[0] == "typical, plain, seed 0, request 0: tokens"
    assert not any("statistics" in text for text in findings.differences)
    assert compare.strict_against_stock(CPU, range(2)).differences[0] == "seed 0, request 0: other tokens than stock's"
    assert len(findings.summary()["first_differences"]) == 10


def test_a_run_that_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right, count = generated.arbitrate, itertools.count()

    def unsteady(*arguments: Any) -> Any:
        result = right(*arguments)
        return replace(result, sampled=result.sampled + (next(count) == 1))

    monkeypatch.setattr(generated, "arbitrate", unsteady)
    assert compare.run_to_run(CPU, 2, vocab=111).differences == ["seed 0: run 1 is not the first"]


def test_a_comparison_stops_when_its_time_is_up_but_has_compared_something() -> None:
    findings = compare.against_reference(few(), CPU, until=0.0)
    assert (findings.batches, findings.cut_short) == (1, True)
    strict = compare.strict_against_stock(CPU, range(5), until=0.0)
    assert (strict.batches, strict.cut_short) == (1, True)


@pytest.mark.parametrize(
    ("vocab", "sampled"),
    [
        pytest.param(1_090, False, id="1090, greedy"),
        pytest.param(1_088, True, id="1088, sampled"),
        pytest.param(1_090, True, id="1090, sampled", marks=pytest.mark.slow),
        pytest.param(1_088, False, id="1088, greedy", marks=pytest.mark.slow),
    ],
)
def test_what_is_timed_agrees_as_often_as_it_says(vocab: int, sampled: bool) -> None:
    case = timed_case(vocab, 16, sampled, CPU, torch.float32)
    assert case.raw.shape == (96, vocab)
    assert case.raw.stride(0) == (1_152 if vocab == 1_090 else 1_088)  # rows as vLLM pads them
    verify, counters, _ = case.prepared(generated.POLICIES["learned"], generated.arbiter(32))
    result = verify()
    accepted = case.stock()[1]
    kept = case.slots.threshold < 0
    # a threshold below every score keeps all drafts, one above every score none that stock does not
    assert torch.equal(result.num_sampled, torch.where(kept, 6, accepted).to(torch.int32))
    assert 0.5 <= float((accepted - 1).clamp(max=4).sum() / 16 / 1.94) <= 1.5  # 0.7 + 0.7^2 + ... of five
    assert 0 < int(counters[:5].sum()) < int(counters[5])


def test_one_read_takes_every_row_in() -> None:
    rows = torch.randn(3, 10_000)[:, :9_001]
    out: dict[str, Any] = {}
    call = clock.read_once(rows)
    out.update(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__ or ()), strict=True))
    call()
    assert torch.equal(out["out"].amax(1), rows.amax(1))


def test_every_launch_of_a_step_is_timed_by_its_name() -> None:
    order: list[int] = []

    class Event:
        def record(self) -> None:
            order.append(id(self))

    case = timed_case(1_090, 2, False, CPU, torch.float32)
    verify, _, _ = case.prepared(generated.POLICIES["learned"], generated.arbiter(32))
    with clock.timed_launches(variants.MODULES, Event) as events:
        verify()
    names = [name for name, _, _ in events]
    assert names[0] == "target_statistics_kernel"
    assert names[-2:] == ["_resample_kernel", "_insert_resampled_kernel"]
    assert [id(event) for _, *pair in events for event in pair] == order
    before = len(events)
    verify()
    assert len(events) == before  # nothing is timed outside


def test_times_stand_beside_stock_and_one_read() -> None:
    common = {"vocab": 1, "batch": 2, "draws": "greedy"}
    rows = [
        common | {"what": times.READ, "device_us": 10.0},
        common | {"what": times.STOCK, "device_us": 20.0},
        common | {"what": "learned", "device_us": 30.0},
    ]
    assert [(row["of_stock"], row["of_read"]) for row in times.ratios(rows)] == [(0.5, 1.0), (1.0, 2.0), (1.5, 3.0)]


def test_what_matters_most_is_timed_first() -> None:
    settings = times.settings((151_936, 32_000), (1, 8, 64, 256))
    assert settings[:2] == [(151_936, 64, False), (151_936, 1, False)]
    assert len(set(settings)) == 16


def test_comparisons_and_times_need_no_compiled_module_of_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILED_MODULES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "COMPARED 6 []"
