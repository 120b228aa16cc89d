"""Keeps the boundaries of draft blocks where a request alone would have them, whatever else is being served.

An arbiter decides by where in its block a mismatch lies, so a block that is cut or dropped changes the text. vLLM's
scheduler does both: it cuts a block to what is left of a step's token budget, and preempts a request without its
drafts. Here a block that does not fit waits for the next step, and a preempted request is computed again up to its
last token but one; after that chunk the drafter proposes what it had proposed before, and the block is verified whole.

Both happen in ``Scheduler._reserve_prefill_lookahead``, the last word on how many tokens a request gets in a step,
where vLLM itself moves the end of a chunk for drafters that need it moved.

What a request finds in the prefix cache is cut where a head's entries belong to another text, see :class:`Behind`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_cospec import compat, reports
from vllm_cospec.hooks import BLOCK_POOL, CONNECTOR
from vllm_cospec.watch import RequestWatch

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
else:
    Scheduler = object

REDRAFT = "cospec_redraft"  # attribute of vLLM's Request: preempted, and its next block not drafted again yet
LOCAL = "cospec_local_tokens"  # attribute of vLLM's Request: how many of its tokens it found in this server's cache
FOREIGN = "cospec_foreign_blocks"  # attribute of vLLM's SchedulerOutput: see foreign_blocks


class Behind:
    """Which tokens follow each cached block in the text it was computed for.

    A head's entry at a position is made of the token behind it as well, and a block's hash ends with the block: the
    last entry of a block that a request finds may be made of another request's token.
    """

    def __init__(self, block_pool: Any, num_tokens: int):
        self._num_tokens = num_tokens  # that an entry reads ahead
        self._known: dict[int, tuple[Sequence[int], int]] = {}  # of each block's id: a text, and where it goes on in it
        self._cache_full_blocks = compat.wrap(BLOCK_POOL, block_pool, self._note)

    def _note(
        self,
        request: Any,
        blocks: Sequence[Any],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        *args: Any,
        **options: Any,
    ) -> None:
        """As the block pool's ``cache_full_blocks``, from which on the blocks can be found."""
        for index in range(num_cached_blocks, num_full_blocks):
            text, end = request.all_token_ids, (index + 1) * block_size
            if end + self._num_tokens <= len(text):
                text, end = tuple(text[end : end + self._num_tokens]), 0
            self._known[blocks[index].block_id] = text, end  # a text that is still being written
        self._cache_full_blocks(request, blocks, num_cached_blocks, num_full_blocks, block_size, *args, **options)

    def num_own(self, request: Any, blocks: Sequence[Any], block_size: int) -> int:
        """Return how many of the first blocks that a request has found go on as it does itself."""
        for index, block in enumerate(blocks):
            if block.is_null:
                continue
            text, end = self._known.get(block.block_id, ((), 0))
            follows = list(text[end : end + self._num_tokens])
            at = (index + 1) * block_size
            if len(follows) < self._num_tokens or follows != request.all_token_ids[at : at + self._num_tokens]:
                return index
        return len(blocks)


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

        settings = getattr(speculative_config, "cospec", None)
        self._watch: RequestWatch | None = None
        if settings is not None and settings.counts_requests:
            self._watch = RequestWatch(settings, self.vllm_config.parallel_config.data_parallel_index)

        self._heads = speculative_config is not None and speculative_config.use_eagle()
        self._behind: Behind | None = None
        # from 0.33 on, hashes cover what a head reads ahead, but for some settings
        if (
            self._heads
            and self.cache_config.enable_prefix_caching
            and not getattr(self, "num_hash_lookahead_tokens", 0)
        ):
            self._behind = Behind(self.kv_cache_manager.block_pool, self.num_prefill_lookahead)
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
        if num_new_tokens > 1:
            end = num_computed_tokens + num_new_tokens
            num_new_tokens -= (self._stops_before_last(request) and end == request.num_tokens) or (
                self._heads and any(feature.mm_position.offset == end for feature in request.mm_features)
            )  # a head reads one token ahead, and of an image that is not encoded yet it would read placeholders
        return num_new_tokens

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """As the scheduler's."""
        setattr(request, REDRAFT, True)
        super()._preempt_request(request, *args, **kwargs)

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any) -> tuple[Any, int, int, bool]:
        """As the scheduler's: (blocks, tokens in them, boundary, diverged); no more than the request can stand on."""
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request, *args)
        if diverged and (self._behind is not None or self._stops_before_last(request)):
            # deeper in some groups than in others, for a connector to fill: vLLM may look again, past this method
            blocks, num_tokens, boundary = self.kv_cache_manager.get_computed_blocks(request, *args)
            diverged = False
        limit = num_tokens
        if self._behind is not None:
            manager = self.kv_cache_manager.coordinator
            # where no hit loses its last block, vLLM does not tell a head's groups from the others
            for group in manager.eagle_group_ids or range(len(blocks.blocks)):
                size = manager.single_type_managers[group].block_size
                full = blocks.blocks[group][: num_tokens // size]
                limit = min(limit, size * self._behind.num_own(request, full, size))
        if self._stops_before_last(request):  # leaves something to draft from
            limit = min(limit, request.num_tokens - 2)
        if limit < num_tokens:
            blocks, num_tokens = self._cut(blocks, limit)
        setattr(request, LOCAL, num_tokens)
        return blocks, num_tokens, boundary, diverged

    def _cut(self, blocks: Any, limit: int) -> tuple[Any, int]:
        """Return (the first of the blocks found, the tokens in them), at most ``limit`` tokens."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        num_tokens = max(limit, 0) // self.block_size * self.block_size
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        # what a window or a state keeps of a prefix is good for its end alone
        if not num_tokens or not all(isinstance(spec, FullAttentionSpec) for spec in specs):
            return self.kv_cache_manager.empty_kv_cache_blocks, 0
        return self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens), num_tokens

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As the scheduler's; what was counted of each request joins what vLLM counts, if it does."""
        reports.take_in(model_runner_output, self.requests)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """As the scheduler's; every request that ends comes here."""
        if self._watch is not None:
            self._watch.ended(request)
        return super()._free_request(request, *args, **kwargs)

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """As the scheduler's, which ignores what is proposed after a chunk that is not a prompt's last."""
        for request_id in draft_token_ids.req_ids:
            self._may_draft_again(self.requests.get(request_id))
        super().update_draft_token_ids(draft_token_ids)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """As the scheduler's; where drafts stay in the worker, placeholders are set for them here."""
        super()._update_after_schedule(scheduler_output)
        if self._watch is not None:
            self._watch.scheduled(scheduler_output, map(self.requests.get, scheduler_output.num_scheduled_tokens))
        if any(self._foreign_blocks):
            setattr(scheduler_output, FOREIGN, self._foreign_blocks)
            self._foreign_blocks = [[] for _ in self._foreign_blocks]
        placeholders = getattr(self, "_spec_token_placeholders", None)
        if placeholders is not None:
            for request_id in scheduler_output.num_scheduled_tokens:
                request = self.requests[request_id]
                if self._may_draft_again(request):
                    request.spec_token_ids = placeholders

    def _handle_invalid_blocks(self, *args: Any) -> set[str]:
        """As the scheduler's; what a step drafted behind a token that is taken back has no place in the text."""
        failed = super()._handle_invalid_blocks(*args)
        for request_id in failed:
            request = self.requests[request_id]
            request.spec_token_ids = []
            request.is_prefill_chunk = True  # computed again from the blocks that failed to load
        return failed

    def _handle_stopped_request(self, request: Any) -> bool:
        """As the scheduler's: whether the request has ended. What was drafted behind a stop goes with it."""
        ended = super()._handle_stopped_request(request)
        request.is_prefill_chunk = True  # with more input to come, it goes on with that
        return ended

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
