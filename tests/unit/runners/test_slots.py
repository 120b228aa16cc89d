"""The table of settings by slot: what the device sees of it, and when it is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_cospec.kernels.reach import STOPS
from vllm_cospec.kernels.scores import NUM_BINS
from vllm_cospec.runners import slots
from vllm_cospec.runners.slots import SlotEntry, Table

CPU = torch.device("cpu")
ENDS = [9, 3, *[-2] * (STOPS - 1)]


def entry(**changes: Any) -> SlotEntry:
    values: dict[str, Any] = {
        "arbitrated": True, "threshold": 0.25, "max_overrides": 7, "max_regret": 1.5, "exact_tokens": 3, "written": 2,
        "forced": -1, "overrides": 0, "ends": ENDS, "scope": "all", **changes,
    }  # fmt: skip
    return SlotEntry(**values)


def test_what_was_written_is_seen_once_it_is_sent() -> None:
    table = Table(5, CPU, scores=False)
    table.enter(3, entry(), 20, 11, None)
    assert table.arbitrated.np.tolist() == [0, 0, 0, 1, 0]
    assert not table.on_device().arbitrated.any()
    table.send()
    seen = {name: value.tolist() for name, value in vars(table.on_device()).items() if value is not None}
    assert seen.pop("ends") == [[0] * (1 + STOPS)] * 3 + [ENDS] + [[0] * (1 + STOPS)]
    assert seen == {
        "arbitrated": [0, 0, 0, 1, 0], "threshold": [0, 0, 0, 0.25, 0], "max_overrides": [0, 0, 0, 7, 0],
        "max_regret": [0, 0, 0, 1.5, 0], "exact_tokens": [0, 0, 0, 3, 0], "overrides_so_far": [0] * 5,
        "regret_so_far": [0] * 5, "stops": [0] * 5, "response_start": [0, 0, 0, 18, 0], "forced": [0, 0, 0, -1, 0],
    }  # fmt: skip
    assert table.seed.tolist() == [0, 0, 0, 11, 0]


def test_a_table_is_sent_in_one_piece_and_only_when_a_request_has_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    send = slots.async_tensor_h2d

    def count(data: Any, device: Any) -> Any:
        sent.append(tuple(data.shape))
        return send(data, device)

    monkeypatch.setattr(slots, "async_tensor_h2d", count)
    table = Table(6, CPU, scores=True)
    assert len(sent) == 1
    for _ in range(3):
        table.send()
    assert len(sent) == 1
    for slot in (0, 4, 5):
        table.enter(slot, entry(overrides=slot), 9, 0, None)
    table.send()
    assert sent[1:] == [sent[0], (2, 3)]  # the settings, and what three requests start with
    assert table.on_device().overrides_so_far.tolist() == [0, 0, 0, 0, 4, 5]


def test_a_step_in_flight_keeps_the_table_it_was_launched_with() -> None:
    table = Table(4, CPU, scores=False)
    table.enter(1, entry(), 9, 0, None)
    table.send()
    launched = table.on_device()
    table.enter(1, entry(threshold=0.75), 9, 0, None)
    table.send()
    assert float(launched.threshold[1]) == 0.25
    assert float(table.on_device().threshold[1]) == 0.75


@pytest.mark.parametrize("size", [1, 6, 8, 9])
def test_what_the_kernels_are_given_is_aligned_as_they_are_compiled_for(size: int) -> None:
    """Triton compiles another program for a pointer that is not a multiple of 16 bytes."""
    table = Table(size, CPU, scores=True)
    for name, part in vars(table.on_device()).items():
        assert part.shape == {"ends": (size, 1 + STOPS), "scores": (size, NUM_BINS)}.get(name, (size,))
        assert part.data_ptr() % 16 == 0, name
    assert table.seed.data_ptr() % 16 == 0


def test_what_was_spent_goes_along_to_the_next_slot() -> None:
    table = Table(4, CPU, scores=False)
    table.enter(1, entry(), 9, 0, None)
    table.send()
    table.spent.overrides[1] += 3
    table.spent.regret[1] += 0.5
    carried = table.spent.leave(1)
    table.enter(1, entry(), 9, 0, None)
    table.enter(2, entry(), 9, 0, carried)
    table.send()
    assert table.on_device().overrides_so_far.tolist() == [0, 0, 3, 0]
    assert table.on_device().regret_so_far.tolist() == [0, 0, 0.5, 0]
