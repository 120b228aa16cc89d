"""The buffers between the stages of a step, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import triton

from vllm_cospec.kernels.scores import SCORE_EDGES
from vllm_cospec.kernels.triton import layout

# As stock: the strict verdict is bit-identical only when sums are taken over the same blocks.
BLOCK_SIZE = 8192
# Stock's are of 1,024; the noise of a token depends on no block, so the tokens drawn are the same.
RESAMPLE_BLOCK_SIZE = 2048


class Workspace:
    """Scratch memory for steps of up to so many rows; a larger step makes it grow.

    Steps run one after the other on one stream, so the next may overwrite what the last has left. What a step returns
    lies elsewhere.
    """

    def __init__(
        self, device: torch.device, vocab_size: int, num_rows: int, num_requests: int, top_k: int = 1,
        use_fp64: bool = False,
    ) -> None:  # fmt: skip
        self._device, self._vocab_size, self._top_k, self._use_fp64 = device, vocab_size, top_k, use_fp64
        self.score_edges = torch.tensor(SCORE_EDGES, dtype=torch.float32, device=device)
        self.num_rows = self.num_requests = 0
        self.reserve(num_rows, num_requests, top_k)

    def reserve(self, num_rows: int, num_requests: int, top_k: int) -> None:
        """See to it that a step of so many rows and requests has room; ``top_k`` of the rule, 0 for none."""
        top_k = max(top_k, 1)
        if num_rows <= self.num_rows and num_requests <= self.num_requests and top_k <= self._top_k:
            return
        self.num_rows, self.num_requests = max(num_rows, self.num_rows), max(num_requests, self.num_requests)
        self._top_k = max(top_k, self._top_k)
        num_blocks = triton.cdiv(self._vocab_size, BLOCK_SIZE)
        num_draws = self.num_requests * triton.cdiv(self._vocab_size, RESAMPLE_BLOCK_SIZE)
        self.blocks, self.rows, self.partials, self.target_lse, self.draft_lse = self._allocate(
            (
                self.num_rows * (layout.BLOCK_FIELDS.value + self._top_k - 1) * num_blocks,
                self.num_rows * layout.ROW_FIELDS.value,
                self.num_rows * layout.MISMATCH_FIELDS.value * num_blocks,
                self.num_requests,
                self.num_requests,
            ),
            torch.float32,
        )
        (self.draw_values,) = self._allocate((num_draws,), torch.float64 if self._use_fp64 else torch.float32)
        (self.draw_tokens,) = self._allocate((num_draws,), torch.int64)

    def _allocate(self, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Cut one allocation into vectors that begin at multiples of 16 bytes."""
        rounded = [triton.cdiv(size, 4) * 4 for size in sizes]
        return torch.empty(sum(rounded), dtype=dtype, device=self._device).split(rounded)
