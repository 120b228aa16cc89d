"""What calibration saw of the requests themselves, for the drift test: figures and the range of their means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_cospec.drift import RANGE_ERROR, Finished, Range, Traffic, standardised
from vllm_cospec.training.measure.noninferiority import mean_bound


def traffic_of(requests: Sequence[Finished]) -> Traffic:
    """Return what calibration saw of its requests."""
    figures = np.stack([request.figures() for request in requests])
    error = RANGE_ERROR / (2 * figures.shape[1])  # all ranges are right together
    ranges = [_range(column[~np.isnan(column)], error) for column in figures.T]
    return Traffic(
        requests=len(requests),
        tokens=ranges[0],
        mismatches_per_token=ranges[1],
        overrides_per_mismatch=ranges[2],
        scores=tuple(ranges[3:]),
    )


def _range(values: np.ndarray, error: float) -> Range:
    """The range one figure's mean lies in, each end wrong with probability ``error``; anything without values."""
    if not len(values):
        return Range(mean=0.5, deviation=0.0, low=0.0, high=1.0)
    mean, deviation = float(values.mean()), float(values.std())
    compared = standardised(values, mean, deviation)
    low, high = mean_bound(compared, 1 - error), 1 - mean_bound(1 - compared, 1 - error)
    return Range(mean=mean, deviation=deviation, low=low, high=high)
