"""Which split a problem belongs to: a hash of its text decides, so splits cannot overlap."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["pretrain", "train", "calibration", "test"]

_SPLIT_BUCKETS: dict[Split, range] = {
    "test": range(0, 4),
    "calibration": range(4, 6),
    "train": range(6, 10),
    "pretrain": range(10, 32),
}
# Of problems that no model was pretrained on here, the larger part trains.
GIVEN: dict[Split, tuple[Split, ...]] = {
    "train": ("train", "pretrain"),
    "calibration": ("calibration",),
    "test": ("test",),
    "pretrain": (),
}


def split_of(prompt: str) -> Split:
    """Return the only split a prompt may appear in: a hash of its text decides, so splits cannot overlap."""
    bucket = hashlib.blake2b(prompt.encode(), digest_size=4).digest()[0] % 32
    return next(split for split, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)
