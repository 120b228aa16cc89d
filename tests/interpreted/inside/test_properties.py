"""What tensor-parallel ranks, large batches and asynchronous scheduling rely on, and the bytes a step moves."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import arbitration_cases as cases
import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from vllm_cospec.arbiter import Arbiter
from vllm_cospec.kernels import UNLIMITED
from vllm_cospec.kernels.policies import Learned, Random, Strict, Typical
from vllm_cospec.kernels.policies import coin as coin_on_cpu
from vllm_cospec.kernels.triton import launch, mismatch, scan, target, verdict
from vllm_cospec.kernels.triton.policies import coin, flatten_weights, network_score, network_weights
from vllm_cospec.kernels.triton.step import Memory, Rows, Sampling, Slots
from vllm_cospec.kernels.triton.workspace import Workspace

LEARNED = Learned(artefact="unused")
VOCAB_SIZE = 151_936 if int(os.environ.get("COSPEC_TEST_REPETITIONS", "1")) > 1 else 20_000
"""Of the count of bytes, which are proportional to it but for single elements; the interpreter is slow."""


def arbiter() -> Arbiter:
    torch.manual_seed(1)
    return Arbiter((32, 32)).eval().requires_grad_(False)


def select(case: cases.Case, order: list[int]) -> cases.Case:
    """The same requests in another order, or only some of them."""
    rows = torch.cat([torch.arange(case.starts[i], case.starts[i + 1]) for i in order])
    raw = case.raw[rows]
    return replace(
        case,
        raw=raw,
        processed=raw if case.processed is case.raw else case.processed[rows],
        draft_sampled=case.draft_sampled[rows],
        pos=case.pos[rows],
        num_drafts=[case.num_drafts[i] for i in order],
        slot=[case.slot[i] for i in order],
    )


def emitted(case: cases.Case, result: Any) -> list[list[int]]:
    return [row[:n] for row, n in zip(result.sampled.tolist(), result.num_sampled.tolist(), strict=True)]


@pytest.mark.parametrize("separate", [False, True])
def test_a_request_depends_neither_on_its_neighbours_nor_on_its_place(separate: bool) -> None:
    case = cases.make_case(21, requests=5, agreement=0.4, separate=separate)
    whole, _, _ = case.ours(LEARNED, arbiter(), collect=True)
    for order in ([4, 2, 0, 1, 3], [3], [1, 4]):
        part = select(case, order)
        got, _, _ = part.ours(LEARNED, arbiter(), collect=True)
        assert emitted(part, got) == [emitted(case, whole)[i] for i in order]
        for place, i in enumerate(order):
            here = slice(part.starts[place], part.starts[place + 1])
            there = slice(case.starts[i], case.starts[i + 1])
            consulted = got.trace.action[here] >= 0
            assert torch.equal(got.trace.action[here], whole.trace.action[there])
            # bitwise: ranks of a tensor-parallel group see different batches of other requests' rows, never other bits
            assert torch.equal(got.trace.statistics[here][consulted], whole.trace.statistics[there][consulted])


def test_a_request_does_not_depend_on_its_slot() -> None:
    case = cases.make_case(22, requests=4, agreement=0.4)
    size = len(case.temperature)
    shift = [(slot + 3) % size for slot in range(size)]  # old slot -> new slot
    back = torch.tensor(np.argsort(shift))
    moved = replace(
        case,
        slot=[shift[s] for s in case.slot],
        draft=case.draft[back],
        temperature=case.temperature[back],
        seed=case.seed[back],
        slots=Slots(**{name: value[back] for name, value in vars(case.slots).items()}),
    )
    assert emitted(moved, moved.ours(LEARNED, arbiter())[0]) == emitted(case, case.ours(LEARNED, arbiter())[0])


def test_what_a_step_leaves_in_the_workspace_changes_nothing_in_the_next() -> None:
    space = Workspace(cases.CPU, 111, 1, 1)
    cases.make_case(61, requests=6, agreement=0.2).ours(LEARNED, arbiter(), collect=True, space=space)
    case = cases.make_case(62, requests=5, agreement=0.2, arbitrated=1.0, full=True)
    after, _, _ = case.ours(LEARNED, arbiter(), collect=True, space=space)
    alone, _, _ = case.ours(LEARNED, arbiter(), collect=True)
    assert emitted(case, after) == emitted(case, alone)
    assert torch.equal(after.trace.action, alone.trace.action)
    consulted = alone.trace.action >= 0
    assert consulted.any()
    assert torch.equal(after.trace.statistics[consulted], alone.trace.statistics[consulted])


def test_rows_and_drafts_beyond_two_to_the_31_elements() -> None:
    """Strides, not allocations: the last row starts beyond what 32 bits can index, in memory never touched before."""
    case = next(
        case
        for case in (
            cases.make_case(seed, requests=2, k=2, full=True, agreement=0.3, arbitrated=1.0) for seed in range(99)
        )
        if max(case.slot) == len(case.temperature) - 1
    )
    rows, vocab = case.raw.shape
    stride = 2**31 // (rows - 2) + 512  # the last row but one has a draft
    far = torch.empty((rows - 1) * stride + vocab).as_strided((rows, vocab), (stride, 1))
    far.copy_(case.raw)
    slots, k, _ = case.draft.shape
    steps = 2**31 // ((slots - 1) * k) + 512
    far_draft = torch.empty((slots * k - 1) * steps + vocab).as_strided((slots, k, vocab), (k * steps, steps, 1))
    far_draft.copy_(case.draft)
    there = replace(case, raw=far, processed=far, draft=far_draft)
    want, _, _ = case.ours(LEARNED, arbiter(), collect=True)
    got, _, _ = there.ours(LEARNED, arbiter(), collect=True)
    assert emitted(there, got) == emitted(case, want)
    assert torch.equal(got.trace.action, want.trace.action)


def test_the_coin_is_the_same_on_every_path() -> None:
    from vllm.triton_utils import tl, triton

    @triton.jit
    def flip(out_ptr, seed, position_ptr, draft_ptr, target_ptr, SIZE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
        i = tl.arange(0, SIZE)
        out = coin(seed, tl.load(position_ptr + i), tl.load(draft_ptr + i), tl.load(target_ptr + i))
        tl.store(out_ptr + i, out)

    g = torch.Generator().manual_seed(0)
    position, draft, target = (torch.randint(0, 200_000, (256,), generator=g) for _ in range(3))
    for seed in (0, 1, 2**31 - 1):
        out = torch.empty(256)
        flip[(1,)](out, (seed * 0x9E3779B1) & 0xFFFFFFFF, position, draft, target, 256)
        assert torch.equal(out, coin_on_cpu(seed, position, draft, target))


def test_the_network_clamps_its_inputs_as_it_does_on_a_cpu() -> None:
    from vllm.triton_utils import tl, triton

    network = cases.arbiter(16, 16)

    @triton.jit
    def one(out_ptr, x_ptr, weights_ptr) -> None:  # type: ignore[no-untyped-def]
        x = tl.load(x_ptr + tl.arange(0, 16))
        kept = network_weights(weights_ptr, 16, 16, 16, 16)
        tl.store(out_ptr, network_score(x, kept, weights_ptr, 16, 16, 16, 16))

    weights = flatten_weights(network.state_dict())
    for deviations in (0.5, 31.0, 33.0, -33.0, 1e6, float("inf")):
        x = network.mean.clone()
        x[4] += deviations * network.scale[4]
        out = torch.empty(1)
        one[(1,)](out, x, weights)
        torch.testing.assert_close(out, network(x[None]))


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors every read of a value raises, so the host code runs through only if it reads none."""
    launches = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launches.append((self.name, grid))

    for module, name in (
        (target, "target_statistics_kernel"),
        (verdict, "verdict_kernel"),
        (mismatch, "mismatch_kernel"),
        (scan, "scan_kernel"),
        (launch.stock, "_resample_kernel"),
        (launch.stock, "_insert_resampled_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(name))
    case = cases.make_case(1, requests=3, k=5, full=True)
    program = cases.compile_policy(LEARNED, cases.CPU, arbiter())
    given: dict[str, Any] = {
        name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in vars(case.rows()).items()
    }
    raw = given["raw"]
    slots = Slots(**{name: value.to("meta") for name, value in vars(case.slots).items()})
    with pytest.raises(RuntimeError):
        raw[0, 0].item()  # the premise
    sampling = Sampling(case.temperature.to("meta"), case.seed.to("meta"))
    launch.arbitrate(
        Rows(**{**given, "processed": raw}), sampling, slots, replace(program, collect=True),
        Memory(torch.zeros(6, device="meta"), Workspace(torch.device("meta"), 111, 1, 1)),
    )  # fmt: skip
    assert [name for name, _ in launches] == [
        "target_statistics_kernel", "verdict_kernel", "mismatch_kernel", "scan_kernel", "_resample_kernel",
        "_insert_resampled_kernel",
    ]  # fmt: skip


@contextlib.contextmanager
def traffic(**tensors: torch.Tensor) -> Iterator[dict[str, int]]:
    """Count the bytes of these tensors that programs load: distinct addresses within a program, summed over programs.

    What one program loads twice in a row it finds in the cache; what two programs load moves twice.
    """
    ranges = {name: (t.data_ptr(), t.data_ptr() + t.nbytes, t.element_size()) for name, t in tensors.items()}
    seen: dict[str, list[np.ndarray]] = defaultdict(list)
    total: dict[str, int] = dict.fromkeys(tensors, 0)
    load, start = InterpreterBuilder.create_masked_load, InterpreterBuilder.set_grid_idx

    def close() -> None:
        for name, pieces in seen.items():
            total[name] += len(np.unique(np.concatenate(pieces))) * ranges[name][2]
        seen.clear()

    def set_grid_idx(self: Any, *index: int) -> None:
        close()
        start(self, *index)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        address = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)]
        for name, (low, high, _) in ranges.items():
            inside = address[(address >= low) & (address < high)]
            if inside.size:
                seen[name].append(inside)
        return load(self, pointers, mask, *args)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.set_grid_idx = create_masked_load, set_grid_idx
    try:
        yield total
        close()
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.set_grid_idx = load, start


def step_with_agreement(sampled: bool, vocab: int, k: int = 5) -> cases.Case:
    """Twelve requests whose first rejections fall as 70 % agreement per position makes them fall on average.

    Of twelve blocks of five, 3.6, 2.5, 1.8, 1.2, 0.9 are first rejected at positions 0 to 4, and 2.0 not at all.
    """
    first = [0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 5]
    case = cases.make_case(
        31, vocab=vocab, k=k, requests=len(first), dtype=torch.bfloat16, full=True, agreement=1.0, arbitrated=1.0,
        sampled=float(sampled),
    )  # fmt: skip
    slots = case.slots
    slots.max_overrides.fill_(UNLIMITED)
    slots.exact_tokens.zero_()
    case.temperature.fill_(1.0 if sampled else 0.0)
    g = np.random.default_rng(0)
    for request, position in enumerate(first):
        for i in range(k):
            row, slot = case.starts[request] + i, case.slot[request]
            # greedy rows agree or not as the draft is the argmax or not; for sampled rows the same, saturated
            agrees = i < position or (i > position and g.random() < 0.7)
            case.raw[row, 17] = 60.0
            case.draft_sampled[row + 1] = 17 if agrees else 18
            case.draft[slot, i, 18] = 60.0
    return case


@pytest.mark.parametrize(("sampled", "bound"), [(False, 1.65), (True, 1.3)], ids=["greedy", "sampled"])
def test_bytes_of_a_step(sampled: bool, bound: float) -> None:
    case = step_with_agreement(sampled, VOCAB_SIZE)
    with traffic(target=case.raw, draft=case.draft) as stock:
        case.stock()
    network = arbiter()
    cases.set_bias(network, -50.0)  # what an override saves in steps is not counted here
    with traffic(target=case.raw, draft=case.draft) as ours:
        result, counters, _ = case.ours(LEARNED, network)
    assert result.num_sampled.tolist() == [1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6]
    assert int(counters[-1]) == 10
    ratio = sum(ours.values()) / sum(stock.values())
    print(f"stock {stock}, ours {ours}, ratio {ratio:.3f}")
    assert ratio <= bound
    row = 2 * case.raw.shape[1]
    if not sampled:
        # sixty rows with drafts, each once; two bonus rows; every rejected row once more, beside the draft's row
        rejected = int((case.draft_sampled == 18).sum())
        assert 10 < rejected < 20
        assert ours["target"] <= (60 + 2 + rejected) * row * 1.001
        assert ours["draft"] <= rejected * row * 1.001
        # behind overrides as well: nothing is read again by the program that decides
        cases.set_bias(network, 50.0)
        with traffic(target=case.raw, draft=case.draft) as ours:
            result, _, _ = case.ours(LEARNED, network)
        assert result.num_sampled.tolist() == [6] * 12
        assert ours["target"] <= (60 + 12 + rejected) * row * 1.001
        assert ours["draft"] <= rejected * row * 1.001
    with traffic(target=case.raw, draft=case.draft) as rule:
        case.ours(Typical())
    assert sum(rule.values()) <= sum(stock.values()) * 1.001  # a rule that ignores the drafter costs nothing more


def test_strict_through_the_fused_path_reads_what_stock_reads() -> None:
    case = cases.make_case(41, vocab=20_000, requests=3, full=True, arbitrated=0.0, agreement=0.6)
    with traffic(target=case.raw, draft=case.draft) as stock:
        case.stock()
    with traffic(target=case.raw, draft=case.draft) as ours:
        case.ours(Strict())
    # a few single elements more: the draft token's own logit
    assert sum(ours.values()) <= 1.001 * sum(stock.values())


def test_random_policy_hits_its_rate() -> None:
    case = cases.make_case(51, requests=12, k=8, full=True, agreement=0.0, sampled=0.0, arbitrated=1.0)
    case.slots.max_overrides.fill_(UNLIMITED)
    case.slots.exact_tokens.zero_()
    case.draft_sampled = torch.where(case.draft_sampled < 0, 3, case.draft_sampled)
    _, counters, _ = case.ours(Random(rate=0.75))
    overrides, mismatches = int(counters[:-1].sum()), int(counters[-1])
    assert mismatches >= 24
    assert 0.5 < overrides / mismatches < 0.95
