"""Keeps the boundaries of draft blocks where a request alone would have them, whatever else is being served.

An arbiter decides by where in its block a mismatch lies, so a block that is cut or dropped changes the text. vLLM's
scheduler does both: it cuts a block to what is left of a step's token budget, and preempts a request without its
drafts. Here a block that does not fit waits for the next step, and a preempted request is computed again up to its
last token but one; after that chunk the drafter proposes what it had proposed before, and the block is verified whole.

Both happen in ``Scheduler._reserve_prefill_lookahead``, the last word on how many tokens a request gets in a step,
where vLLM itself moves the end of a chunk for drafters that need it moved.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_cospec import compat
from vllm_cospec.compat import CONNECTOR

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
else:
    Scheduler = object

REDRAFT = "cospec_redraft"  # attribute of vLLM's Request: preempted, and its next block not drafted again yet
LOCAL = "cospec_local_tokens"  # attribute of vLLM's Request: how many of its tokens it found in this server's cache
FOREIGN = "cospec_foreign_blocks"  # attribute of vLLM's SchedulerOutput: see foreign_blocks


class WholeBlocks(Scheduler):
    """Mixed into vLLM's scheduler."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        limit = self.scheduler_config.long_prefill_token_threshold
        if limit > 0:  # meant for prompts; a block is not to be cut by it
            self.scheduler_config.long_prefill_token_threshold = max(limit, 1 + self.num_spec_tokens)
        speculative_config = self.vllm_config.speculative_config
        drafting = speculative_config.max_num_new_slots_for_drafting if speculative_config is not None else 0
        self._tokens_alone = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens - drafting)

        self._foreign_blocks: list[list[int]] = [[] for _ in self.kv_cache_config.kv_cache_groups]
        if self.connector is not None:
            self._after_alloc = compat.wrap(CONNECTOR, self.connector, self._note_foreign_blocks)

    def _note_foreign_blocks(self, request: Any, blocks: Any, num_external_tokens: int, *args: Any) -> None:
        """As the connector's ``update_state_after_alloc``; what it loads, the drafter has not seen."""
        if num_external_tokens:
            groups = self.kv_cache_config.kv_cache_groups
            for noted, group, own in zip(self._foreign_blocks, groups, blocks.get_block_ids(), strict=True):
                noted += own[getattr(request, LOCAL, 0) // group.kv_cache_spec.block_size :]
        self._after_alloc(request, blocks, num_external_tokens, *args)

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """As the scheduler's: how many of ``num_new_tokens`` the request gets in this step; 0 while it runs: none."""
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.spec_token_ids:
            block = request.num_tokens_with_spec + request.num_output_placeholders - num_computed_tokens
            room = self.max_model_len - num_computed_tokens - self.num_sampled_tokens_per_step
            return num_new_tokens if num_new_tokens >= min(block, room, self._tokens_alone) else 0
        if self._stops_before_last(request) and num_new_tokens > 1:
            num_new_tokens -= num_computed_tokens + num_new_tokens == request.num_tokens
        return num_new_tokens

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """As the scheduler's."""
        setattr(request, REDRAFT, True)
        super()._preempt_request(request, *args, **kwargs)

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any) -> tuple[Any, int, int, bool]:
        """As the scheduler's: (blocks, tokens in them, boundary, diverged); leaves more than the last token."""
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request, *args)
        if self._stops_before_last(request) and num_tokens and num_tokens == request.num_tokens - 1:
            if num_tokens % self.block_size:
                return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
            num_tokens -= self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
        setattr(request, LOCAL, num_tokens)
        return blocks, num_tokens, boundary, diverged

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """As the scheduler's, which ignores what is proposed after a chunk that is not a prompt's last."""
        for request_id in draft_token_ids.req_ids:
            self._may_draft_again(self.requests.get(request_id))
        super().update_draft_token_ids(draft_token_ids)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """As the scheduler's; where drafts stay in the worker, placeholders are set for them here."""
        super()._update_after_schedule(scheduler_output)
        if any(self._foreign_blocks):
            setattr(scheduler_output, FOREIGN, self._foreign_blocks)
            self._foreign_blocks = [[] for _ in self._foreign_blocks]
        placeholders = getattr(self, "_spec_token_placeholders", None)
        if placeholders is not None:
            for request_id in scheduler_output.num_scheduled_tokens:
                request = self.requests[request_id]
                if self._may_draft_again(request):
                    request.spec_token_ids = placeholders

    def _drafts_unused(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> bool:
        """As the scheduler's, from vLLM 0.33 on."""
        if self._stops_before_last(request) and num_computed_tokens + num_new_tokens == request.num_tokens - 1:
            return False
        return super()._drafts_unused(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]

    def _stops_before_last(self, request: Any) -> bool:
        """Whether the request is computed up to its last token but one before it goes on decoding."""
        return getattr(request, REDRAFT, False) and request.num_output_tokens > 0

    def _may_draft_again(self, request: Any) -> bool:
        """Let a resumed request decode once all but its last token are computed; returns whether that was now."""
        if (
            request is None
            or not self._stops_before_last(request)
            or request.num_computed_tokens < request.num_tokens - 1
        ):
            return False
        setattr(request, REDRAFT, False)
        first = request.num_computed_tokens == request.num_tokens - 1
        if first:
            request.is_prefill_chunk = False
        return first


def foreign_blocks(scheduler_output: Any, group: int) -> list[int]:
    """Return the blocks of a KV cache group that a connector is to fill from elsewhere, as of this step."""
    every = getattr(scheduler_output, FOREIGN, None)
    return every[group] if every else []


@functools.cache
def keeping_blocks_whole(scheduler: type) -> type:
    """Return the scheduler's class, extended by :class:`WholeBlocks`."""
    return type(scheduler.__name__, (WholeBlocks, scheduler), {"__module__": scheduler.__module__})


class CoSpecScheduler:
    """Named to vLLM as ``scheduler_cls``; makes the scheduler vLLM would have chosen, extended where cospec is used."""

    def __new__(cls, *args: Any, vllm_config: Any, **kwargs: Any) -> Any:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        stock = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
        used = getattr(vllm_config.speculative_config, "cospec", None) is not None
        chosen = keeping_blocks_whole(stock) if used else stock
        return chosen(*args, vllm_config=vllm_config, **kwargs)
