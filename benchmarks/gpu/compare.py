"""Whether the kernels, as this machine compiles them, decide as the reference and draw as stock vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.cases import generated, moved
from benchmarks.gpu.processes import spread
from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels.policies import Policy, Strict

Case = generated.Case
CPU = torch.device("cpu")
# Float32 sums over at most 151,936 terms; a relative 1e-4 leaves a factor of ten.
RELATIVE, ABSOLUTE = 1e-4, 2e-4
LARGE, STRICT, RUNS, GENERATED = (
    "real vocabularies against the reference", "strict against stock", "run to run",
    "generated batches against the reference",
)  # fmt: skip


@dataclass
class Findings:
    """What a comparison came to."""

    batches: int = 0
    requests: int = 0
    too_close_to_call: int = 0  # requests with a comparison that float32 may decide either way
    differences: list[str] = field(default_factory=list)
    cut_short: bool = False  # the time was up

    def summary(self) -> dict[str, Any]:
        """Return the findings for a report; of many differences the first ten."""
        return {
            "batches": self.batches,
            "requests": self.requests,
            "too_close_to_call": self.too_close_to_call,
            "differences": len(self.differences),
            "first_differences": self.differences[:10],
            "cut_short": self.cut_short,
        }


def generated_batches(repetition: int) -> Iterator[tuple[str, Case, Policy]]:
    """Yield (name, batch on the CPU, policy): every policy in every regime, as the interpreted tests have them."""
    for number, (name, policy) in enumerate(generated.POLICIES.items()):
        for regime_number, regime in enumerate(generated.REGIMES):
            for variant in range(2):
                seed = 1000 * repetition + 10 * variant + regime_number
                case = generated.make_case(
                    seed, vocab={3: 9_000, 4: 2_600}.get(repetition % 5, 111),
                    k=(5, 1 + (2 + 7 * repetition + 3 * number) % 16)[variant], regime=regime,
                    separate=bool((seed + repetition) % 2) or regime == "nan",
                    dtype=(torch.float32, torch.bfloat16)[variant], agreement=0.4,
                )  # fmt: skip
                yield f"{name}, {regime}, seed {seed}", case, policy


def large_batches() -> Iterator[tuple[str, Case, Policy]]:
    """Yield batches of real vocabularies, padded ones among them."""
    for vocab, dtype in ((32_000, torch.bfloat16), (49_155, torch.float16), (128_256, torch.float32),
                         (151_936, torch.bfloat16)):  # fmt: skip
        case = generated.make_case(
            vocab, vocab=vocab, k=3, requests=3, dtype=dtype, arbitrated=1.0, agreement=0.3, full=True
        )
        for name in ("learned", "typical", "mars"):
            yield f"{name}, vocabulary of {vocab}", case, generated.POLICIES[name]


def against_reference(
    batches: Iterator[tuple[str, Case, Policy]], device: torch.device, until: float = float("inf")
) -> Findings:
    """Compare decisions, statistics and tokens, of one batch at least; ``until`` in seconds of the monotonic clock."""
    findings, network = Findings(), generated.arbiter(32, 32)
    for name, case, policy in batches:
        if findings.batches and time.monotonic() > until:
            findings.cut_short = True
            break
        _compare(name, case, policy, network, device, findings)
    return findings


def _compare(name: str, case: Case, policy: Policy, network: Arbiter, device: torch.device, findings: Findings) -> None:
    there = moved(case, device)
    want = generated.expected(case, policy, network, generated.uniforms(there).to(CPU))
    result, _, slots = there.ours(policy, network, collect=True)
    got = moved(result, CPU)
    accepted = [one.num_accepted for one in want.results]
    emitted, counts = there.stock(generated.pushed(case, accepted).to(device))
    overrides = slots.overrides_so_far.tolist()
    findings.batches += 1
    for request, one in enumerate(want.results):
        findings.requests += 1
        if want.ambiguous[request]:
            findings.too_close_to_call += 1
            continue
        start, count = case.starts[request], int(got.num_sampled[request])
        rows = range(start, start + case.num_drafts[request])
        action = [int(got.trace.action[row]) for row in rows]
        consulted = [i for i, decided in enumerate(action) if decided >= 0]
        before = int(case.slots.overrides_so_far[case.slot[request]])
        checks = {
            "number of tokens": count == one.num_accepted + 1 == int(counts[request]),
            "tokens": got.sampled[request, :count].tolist() == emitted[request, :count].tolist(),
            "overrides": [i for i in consulted if action[i] == 1] == one.overrides,
            "mismatches consulted": len(consulted) == len(one.statistics),
            "overrides counted": overrides[case.slot[request]] == before + len(one.overrides),
        }
        checks["statistics"] = checks["mismatches consulted"] and all(
            torch.allclose(got.trace.statistics[start + i], statistics, rtol=RELATIVE, atol=ABSOLUTE)
            for i, statistics in zip(consulted, one.statistics, strict=True)
        )
        findings.differences += [f"{name}, request {request}: {what}" for what, same in checks.items() if not same]


def strict_against_stock(device: torch.device, seeds: Iterable[int], until: float = float("inf")) -> Findings:
    """Compare the tokens of strict requests with stock's, bit for bit: alone, and beside arbitrated ones."""
    findings = Findings()
    for seed in seeds:
        if findings.batches and time.monotonic() > until:
            findings.cut_short = True
            break
        case = generated.make_case(
            seed, vocab=(111, 9_000, 32_000)[seed % 3], requests=6, separate=seed % 2 == 1,
            arbitrated=(0.0, 0.5, 1.0)[seed // 2 % 3], draft_logits=seed % 5 != 4, agreement=0.7,
            dtype=(torch.float32, torch.bfloat16)[seed // 3 % 2],
        )  # fmt: skip
        there = moved(case, device)
        policy = Strict() if seed % 4 else generated.POLICIES["random"]
        tokens, counts = there.stock()
        result, _, _ = there.ours(policy)
        findings.batches += 1
        for request, slot in enumerate(case.slot):
            if policy is not generated.POLICIES["random"] or not case.slots.arbitrated[slot]:
                findings.requests += 1
                count = int(counts[request])
                if count != int(result.num_sampled[request]) or not torch.equal(
                    tokens[request, :count], result.sampled[request, :count]
                ):
                    findings.differences.append(f"seed {seed}, request {request}: other tokens than stock's")
    return findings


def run_to_run(device: torch.device, runs: int, vocab: int = 32_000) -> Findings:
    """Verify the same batches again and again: tokens and statistics must be the same to the last bit."""
    findings, network = Findings(), generated.arbiter(32, 32)
    for seed in range(4):
        case = moved(
            generated.make_case(seed, vocab=vocab, requests=8, agreement=0.4, dtype=torch.bfloat16, full=True), device
        )
        findings.batches += 1

        def outcome(one: Case = case) -> tuple[Any, ...]:
            result, counters, slots = one.ours(generated.POLICIES["learned"], network, collect=True)
            consulted = result.trace.action >= 0
            emitted = torch.arange(result.sampled.shape[1], device=device) < result.num_sampled[:, None]
            return tuple(
                part.cpu()
                for part in (
                    result.sampled[emitted], result.num_sampled, result.trace.action, counters, slots.overrides_so_far,
                    result.trace.statistics[consulted], result.trace.probability[consulted],
                )
            )  # fmt: skip

        first = outcome()
        for run in range(1, runs):
            findings.requests += len(case.slot)
            if not all(torch.equal(one, other) for one, other in zip(first, outcome(), strict=True)):
                findings.differences.append(f"seed {seed}: run {run} is not the first")
    return findings


@dataclass(frozen=True)
class ComparisonShare:
    """A share of the comparisons, for one process."""

    name: str
    device: torch.device
    until: float  # of the monotonic clock, which the processes of a machine share
    number: int = 0
    """Which batches."""


def run(task: ComparisonShare) -> Findings:
    """Make the comparisons of a task."""
    device, until = task.device, task.until
    parts: dict[str, Callable[[], Findings]] = {
        LARGE: lambda: against_reference(large_batches(), device, until),
        STRICT: lambda: strict_against_stock(device, range(6 * task.number, 6 * task.number + 6), until),
        RUNS: lambda: run_to_run(device, 5),
        GENERATED: lambda: against_reference(generated_batches(task.number), device, until),
    }
    return parts[task.name]()


def merged(findings: list[Findings]) -> Findings:
    """Return the findings of several tasks as one."""
    return Findings(
        batches=sum(one.batches for one in findings),
        requests=sum(one.requests for one in findings),
        too_close_to_call=sum(one.too_close_to_call for one in findings),
        differences=[text for one in findings for text in one.differences],
        cut_short=any(one.cut_short for one in findings),
    )


def everything(device: torch.device, repetitions: int, until: float, workers: int) -> dict[str, dict[str, Any]]:
    """Run all comparisons; returns their summaries."""
    tasks = [ComparisonShare(LARGE, device, until), ComparisonShare(RUNS, device, until)]
    for number in range(repetitions):
        tasks += [ComparisonShare(GENERATED, device, until, number), ComparisonShare(STRICT, device, until, number)]
    done = spread(run, tasks, workers)
    return {
        name: merged([one for task, one in zip(tasks, done, strict=True) if task.name == name]).summary()
        for name in (LARGE, STRICT, RUNS, GENERATED)
    }
