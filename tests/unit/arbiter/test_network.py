"""What the network makes of its inputs."""

import pytest
import torch
from artefacts import make_arbiter

from vllm_cospec.kernels.statistics import INPUT_LIMIT, NUM_STATISTICS


def far_off(deviations: float) -> torch.Tensor:
    """The score where one statistic is so many deviations from its mean, and the others are at theirs."""
    arbiter = make_arbiter((8, 8))
    arbiter.scale[3] = 1e-3  # hardly varied in training
    row = arbiter.mean.clone()
    row[3] += deviations * arbiter.scale[3]
    return arbiter(row.expand(2, NUM_STATISTICS))


@pytest.mark.parametrize("sign", [1, -1])
def test_inputs_are_clamped_after_standardising(sign: int) -> None:
    limit = far_off(sign * (INPUT_LIMIT + 0.5))
    assert torch.equal(far_off(sign * 1e6), limit)
    assert torch.equal(far_off(sign * float("inf")), limit)
    assert not torch.equal(far_off(sign * (INPUT_LIMIT - 1)), limit)


def test_no_number_stays_none() -> None:
    assert far_off(float("nan")).isnan().all()  # which exceeds no threshold
