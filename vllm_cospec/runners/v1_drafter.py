"""What both V1 adapters do around vLLM's drafter: run it for every request it can follow, and know which it has.

vLLM skips the drafter for the whole batch when one sequence is near the end of the drafter's context, and the others
go on from a cache with a hole. Here the drafter always runs. The rows of a sequence it cannot follow write nothing
and propose nothing; the others do not notice. :class:`vllm_cospec.runners.draft_cache.DraftCache` finds what holes are
left, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_cospec import compat
from vllm_cospec.config import Settings
from vllm_cospec.health import Reason
from vllm_cospec.hooks import PROPOSER, RUNNER
from vllm_cospec.runners.draft_cache import DraftCache, Span
from vllm_cospec.scheduler import foreign_blocks

NO_SLOT = -1  # vLLM's: a key and value that are written nowhere


class V1Drafter:
    """Wraps the drafter and the methods of a V1 runner that have to do with it, on the instances."""

    def __init__(self, runner: Any, settings: Settings):
        self._runner = runner
        self._k = settings.num_speculative_tokens
        self._drafter = drafter = runner.drafter
        self._cache: DraftCache | None = None
        self._group = -1  # of the KV cache
        self._ends: list[int] = []  # of the requests' tokens that the running step computes
        self._entered: set[str] = set()  # requests that are new in this step, or back
        self._outgrown: Tensor | None = None  # bool [B], of the batch that is being drafted for
        self._propose = compat.wrap(f"{PROPOSER}.propose", drafter, self.propose)
        self._update_states = compat.wrap(f"{RUNNER}._update_states", runner, self.update_states)
        self._take_draft_token_ids = compat.wrap(f"{RUNNER}.take_draft_token_ids", runner, self.take_draft_token_ids)
        compat.wrap(f"{RUNNER}._input_fits_in_drafter", runner, lambda metadata: metadata is not None)
        self._has_context = hasattr(drafter, "set_inputs_first_pass")
        if self._has_context:
            self._prepare_next_tokens = compat.wrap(
                f"{PROPOSER}.prepare_next_token_ids_padded", drafter, self.prepare_next_tokens
            )
            self._set_inputs_first_pass = compat.wrap(
                f"{PROPOSER}.set_inputs_first_pass", drafter, self.set_inputs_first_pass
            )
            self._update_positions = compat.wrap(
                f"{PROPOSER}._update_positions_dependent_metadata", drafter, self.update_positions
            )
            self._dummy_run = compat.wrap(f"{PROPOSER}.dummy_run", drafter, self.dummy_run)

    def update_states(self, scheduler_output: Any) -> Any:
        """As the runner's: learn which requests a step is for."""
        old, new = scheduler_output.scheduled_cached_reqs, scheduler_output.scheduled_new_reqs
        entered = {request.req_id: (request, request.num_computed_tokens) for request in new} | {
            request_id: (self._runner.requests[request_id], num_computed)
            for request_id, num_computed in zip(old.req_ids, old.num_computed_tokens, strict=True)
            if request_id in old.resumed_req_ids
        }
        self._entered = set(entered)
        cache = self._draft_cache()
        if cache is not None:
            cache.forget(scheduler_output.finished_req_ids)
            cache.reset(foreign_blocks(scheduler_output, self._group))
            for copy in scheduler_output.kv_cache_block_copies or ():
                cache.copy(*copy)
            for request_id, (request, num_computed) in entered.items():
                cache.enter(request_id, num_computed if self._can_follow(request) else -1)
        return self._update_states(scheduler_output)

    def _can_follow(self, request: Any) -> bool:
        """Return whether the drafter can see all that a new or resumed request consists of."""
        return request.prompt_embeds is None and not (request.mm_features and not self._drafter.supports_mm_inputs)

    def computed(self) -> None:
        """Note that the target has computed the runner's batch; every step calls it before the drafter runs."""
        batch, runner = self._runner.input_batch, self._runner
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs]
        ends = starts + np.diff(runner.query_start_loc.np[: batch.num_reqs + 1])
        self._ends = ends.tolist()
        if self._cache is not None:
            blocks = [runner.requests[request_id].block_ids[self._group] for request_id in batch.req_ids]
            self._cache.computed(
                [Span(*span) for span in zip(batch.req_ids, blocks, starts.tolist(), self._ends, strict=True)]
            )

    def find_placeholders(self, request_ids: Sequence[str], num_draft_tokens: Sequence[int]) -> np.ndarray:
        """Return which requests of the batch come with drafts although nothing can have been proposed, bool [B]."""
        return np.array(
            [n > 0 and name in self._entered for name, n in zip(request_ids, num_draft_tokens, strict=True)], bool
        )

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """As the drafter's."""
        every = len(self._runner.input_batch.req_ids)
        whole = [True] * every if self._cache is None else self._cache.drafted()
        self._outgrown = self._find_outgrown(**kwargs) if self._has_context else None
        self.begin(whole)
        if len(args) > 1 and isinstance(args[1], list):  # ngram's: number of drafts, what was sampled, ...
            args = (args[0], self._with_resumed(args[1]), *args[2:])
        proposed = self._propose(*args, **kwargs)
        self.end(proposed)
        self._outgrown = None
        return proposed

    def begin(self, whole: list[bool]) -> None:
        """The drafter is about to run; ``whole`` says of each request of the batch whether it has seen all of it."""
        raise NotImplementedError

    def end(self, proposed: Any) -> None:
        """The drafter has proposed: [B, K] tokens, or lists of them."""
        raise NotImplementedError

    def withdraw(self, request_id: str, reason: Reason) -> None:
        """What was just proposed for the request will not be verified."""
        raise NotImplementedError

    def take_draft_token_ids(self) -> Any:
        """As the runner's: drafts beyond the drafter's context are not handed out."""
        drafts = self._take_draft_token_ids()
        if drafts is None or not self._has_context:
            return drafts
        limit = self._context()
        for index, request_id in enumerate(drafts.req_ids):
            if self._runner.requests[request_id].num_tokens - 1 + self._k > limit:
                drafts.draft_token_ids[index] = []
                self.withdraw(request_id, Reason.CONTEXT)
        return drafts

    def _context(self) -> int:
        """Return the drafter's context in tokens."""
        return self._runner.effective_drafter_max_model_len

    def _find_outgrown(self, common_attn_metadata: Any, num_rejected_tokens_gpu: Any = None, **_: Any) -> Tensor | None:
        """Return which requests' drafts would not fit into the drafter's context, bool [B]; None for no request."""
        limit = self._drafter.max_model_len = self._context()
        if common_attn_metadata.max_seq_len + self._k <= limit:
            return None
        known = common_attn_metadata.seq_lens
        if num_rejected_tokens_gpu is not None:
            known = known - num_rejected_tokens_gpu
        return known + self._k > limit

    def _with_resumed(self, sampled_token_ids: list[list[int]]) -> list[list[int]]:
        """Return what was sampled, with something for requests that are drafted again.

        After a preemption a request is computed up to its last token but one, and nothing is sampled, see
        ``vllm_cospec.scheduler``; ngram passes over requests for which nothing was.
        """
        requests = [self._runner.requests[request_id] for request_id in self._runner.input_batch.req_ids]
        return [
            request.output_token_ids[-1:] if not tokens and end == request.num_tokens - 1 else tokens
            for tokens, end, request in zip(sampled_token_ids, self._ends, requests, strict=True)
        ]

    def prepare_next_tokens(self, sampled: Tensor, requests: Any, batch: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """As the drafter's: (the token behind what each request computed [B], number of valid samples [B]).

        For a chunk that is not a prompt's last, stock gives the prompt's last token. A head, which is fed every token
        with the one behind it, would keep that at the end of each chunk.
        """
        next_tokens, num_valid = self._prepare_next_tokens(sampled, requests, batch, *args)
        chunks = np.flatnonzero(self._runner.discard_request_mask.np[: batch.num_reqs])
        known = np.array([requests[batch.req_ids[i]].get_token_id(self._ends[i]) for i in chunks], np.int32)
        if len(chunks):
            next_tokens[async_tensor_h2d(chunks, next_tokens.device)] = async_tensor_h2d(known, next_tokens.device)
        return next_tokens, num_valid

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> tuple[int, Tensor, Any]:
        """As the drafter's: positions beyond the context write nothing and are fed as one within it."""
        num_tokens, indices, metadata = self._set_inputs_first_pass(*args, **kwargs)
        if self._outgrown is not None:
            positions = self._drafter._get_positions(num_tokens)
            beyond = positions >= self._drafter.max_model_len
            positions.masked_fill_(beyond, 0)
            beyond = beyond if beyond.ndim == 1 else beyond[0]
            metadata = replace(metadata, slot_mapping=metadata.slot_mapping[:num_tokens].masked_fill(beyond, NO_SLOT))
        return num_tokens, indices, metadata

    def update_positions(self, positions: Tensor, common_attn_metadata: Any, batch_size: int, *args: Any) -> Tensor:
        """As the drafter's: sequences that have outgrown it write nothing."""
        positions = self._update_positions(positions, common_attn_metadata, batch_size, *args)
        if self._outgrown is not None:
            positions.masked_fill_(self._outgrown, 0)
            common_attn_metadata.slot_mapping.masked_fill_(self._outgrown, NO_SLOT)
            common_attn_metadata.seq_lens.masked_fill_(self._outgrown, 1)
        return positions

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """As the drafter's: a run for nobody writes nothing. Stock leaves the slots of the last step where it reads."""
        self._drafter._slot_mapping_buffer.fill_(NO_SLOT)
        self._dummy_run(*args, **kwargs)

    def _draft_cache(self) -> DraftCache | None:
        """Return the book of the drafter's KV cache, None for drafters without one."""
        config = getattr(self._runner, "kv_cache_config", None)
        if self._cache is None and config is not None and getattr(self._drafter, "draft_attn_groups", None):
            self._group = self._drafter.kv_cache_gid
            block_size = config.kv_cache_groups[self._group].kv_cache_spec.block_size
            self._cache = DraftCache(config.num_blocks, block_size)
        return self._cache
