"""What the stand-in changes about Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from vllm.triton_utils import tl, triton


@triton.jit
def last_of(value, place, other_value, other_place):  # type: ignore[no-untyped-def]
    """The right one, unless it is negative; and the larger place."""
    return tl.where(other_value < 0, value, other_value), tl.maximum(place, other_place)


@triton.jit
def reduce_kernel(out_ptr, place_ptr, values_ptr, ROWS: tl.constexpr, SIZE: tl.constexpr, AXIS: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    values = tl.load(values_ptr + rows * SIZE + columns)
    value, place = tl.reduce((values, rows + columns), AXIS, last_of)
    kept = tl.arange(0, SIZE if AXIS == 0 else ROWS)
    tl.store(out_ptr + kept, value)
    tl.store(place_ptr + kept, place)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduction_keeps_the_order_of_its_elements(axis: int) -> None:
    values = torch.randint(-3, 6, (4, 16), generator=torch.Generator().manual_seed(3)).float()
    kept = values.shape[1 - axis]
    out, place = torch.zeros(kept), torch.zeros(kept, dtype=torch.int64)
    reduce_kernel[(1,)](out, place, values, ROWS=4, SIZE=16, AXIS=axis)
    rows = values.T if axis == 0 else values
    expected = [next((float(v) for v in reversed(row) if v >= 0), float(row[0])) for row in rows]
    assert out.tolist() == expected
    assert place.tolist() == [i + (3 if axis == 0 else 15) for i in range(kept)]
