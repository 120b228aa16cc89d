"""Model Runner V2: how far the draft of each request can be trusted, and what keeps its drafters from harm.

V2 runs the drafter at every step, feeds it every token of the step, prefill chunks included, and keeps its tokens and
logits by request slot until they are verified. So a block that waits for its turn meets its own logits, and the
drafter's KV cache lacks nothing but what ``docs/draft_health.md`` lists: what was read from elsewhere, what lies behind
the drafter's own context, and what vLLM's drafters write over. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm_cospec import compat, hooks
from vllm_cospec.config import Settings
from vllm_cospec.health import REASONS, Reason
from vllm_cospec.runners.device import DeviceCounters


class Arbitrated(NamedTuple):
    """The slots whose drafts the policy may decide on in one step, nonzero int32 [S]."""

    on_host: np.ndarray  # may still hold requests that have just outgrown the drafter's context
    on_device: Tensor


class DraftHealth:
    """Decides at every step which requests' drafts are whole, and counts the positions of those that are not."""

    def __init__(self, runner: Any, settings: Settings, counters: DeviceCounters):
        config, transfer = runner.speculative_config, runner.vllm_config.kv_transfer_config
        self._runner = runner
        self._counters = counters
        self._num_drafts = settings.num_speculative_tokens
        self._has_cache = settings.draft_logits  # ngram reads the tokens alone
        self.context = config.draft_model_config.max_model_len if self._has_cache else runner.max_model_len
        self._foreign_prefixes = transfer is not None and transfer.is_kv_consumer
        # where a load fails, the token sampled meanwhile is taken back
        self._takes_back = transfer is not None and transfer.kv_load_failure_policy == "recompute"
        self._unseen = np.zeros(runner.max_num_reqs, bool)
        self._shortened = np.zeros(runner.max_num_reqs, bool)

    def add_request(self, slot: int, request: Any) -> None:
        """Take up a request; slots are recycled, so everything is overwritten.

        Args:
            slot: the runner's.
            request: vLLM's NewRequestData.
        """
        params = request.sampling_params
        blind = request.prompt_embeds is not None or (
            bool(request.mm_features) and not self._runner.speculator.supports_mm_inputs
        )
        prefix = request.num_computed_tokens > 0 and self._foreign_prefixes
        self._unseen[slot] = (self._has_cache and (blind or prefix)) or (self._takes_back and prefix)
        self._shortened[slot] = params is not None and params.structured_outputs is not None  # by its own grammar

    def arbitrated(self, batch: Any, wanted: Any) -> Arbitrated:
        """Return the slots whose drafts are whole in this step, and count the drafts that are not.

        Args:
            batch: vLLM's InputBatch, with drafts.
            wanted: slots.Settled, nonzero int32 [S] where the request is to be arbitrated.
        """
        slots, counts, computed = batch.idx_mapping_np, batch.num_draft_tokens_per_req, batch.num_computed_tokens_np
        asked = wanted.np[slots] != 0
        unseen = asked & self._unseen[slots]
        room = computed + self._num_drafts + 1 < self._runner.max_model_len
        cut = (counts < self._num_drafts) & room & ~batch.is_prefilling_np & ~self._shortened[slots]
        cut &= asked & ~unseen
        # the host knows a position only as an upper bound, the device knows better
        far = asked & ~unseen & ~cut & (computed + counts > self.context)
        if not (unseen | cut | far).any():
            return Arbitrated(wanted.np, wanted.gpu)
        self._count(Reason.CACHE, int(counts[unseen].sum()))
        self._count(Reason.DRAFT_COUNT, int(counts[cut].sum()))
        on_host = wanted.np.copy()
        on_host[slots[unseen | cut]] = 0
        on_device = async_tensor_h2d(on_host, self._runner.device)
        if far.any():
            self._leave_out_what_lies_behind_the_context(batch, on_device)
        return Arbitrated(on_host, on_device)

    def _leave_out_what_lies_behind_the_context(self, batch: Any, arbitrated: Tensor) -> None:
        """Zero the slots of blocks with a draft made from a position the drafter does not have."""
        slots, num_rows = batch.idx_mapping, batch.cu_num_logits.diff()
        before = arbitrated[slots]
        # The last token of the sequence is a draft; it was made from the position before its own.
        beyond = (batch.seq_lens[: batch.num_reqs] - 1 > self.context) & (before != 0)
        arbitrated[slots] = torch.where(beyond, 0, before)
        self._counters.unhealthy[REASONS.index(Reason.CONTEXT)] += ((num_rows - 1) * beyond).sum()

    def _count(self, reason: Reason, positions: int) -> None:
        if positions:
            self._counters.unhealthy[REASONS.index(reason)] += positions


class ResumedRequests:
    """Lets a preempted request go on with the block it had.

    The scheduler resumes it with all but its last token, after which the drafter proposes that block again. V2 takes
    the last token a slot has sampled for the drafter's next, and drafts within what it knew of a request at its
    admission for placeholders: here the last token of a resumed request becomes one it has sampled.
    """

    def __init__(self, runner: Any):
        self._runner = runner
        self._waiting: set[str] = set()  # resumed and not decoding yet

    def add_request(self, slot: int, request: Any) -> None:
        """Take up a request, vLLM's NewRequestData."""
        if len(request.prefill_token_ids) > request.prompt_len:
            self._waiting.add(request.req_id)
            self._runner.req_states.last_sampled_tokens[slot].fill_(request.prefill_token_ids[-1])

    def finish_requests(self, scheduler_output: Any) -> None:
        """Let those decode that are about to, once the runner has let go of the requests that are gone."""
        self._waiting.difference_update(scheduler_output.finished_req_ids)
        if not self._waiting:
            return
        states, cached, changed = self._runner.req_states, scheduler_output.scheduled_cached_reqs, False
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if req_id not in self._waiting:
                continue
            slot = states.req_id_to_index[req_id]
            if computed == states.prefill_len.np[slot] - 1 and req_id in scheduler_output.scheduled_spec_decode_tokens:
                states.prefill_len.np[slot] -= 1
                changed = True
            if computed >= states.prefill_len.np[slot]:
                self._waiting.discard(req_id)
        if changed and not scheduler_output.scheduled_new_reqs:  # else the runner sends it, and once is enough
            states.prefill_len.copy_to_uva()


class NgramMatches:
    """Wraps the ngram drafter: how many of a slot's drafts it found; the last sampled token stands for the others."""

    def __init__(self, speculator: NgramGPUSpeculator):
        self._speculator = speculator
        self._found = torch.zeros(speculator.max_num_reqs, dtype=torch.int64, device=speculator.device)
        self._propose = compat.wrap(f"{hooks.V2_NGRAM}.propose", speculator, self.propose)

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        *args: Any,
        **rest: Any,
    ) -> Tensor:
        """As the drafter's: [R, K]."""
        inputs = (input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states)
        if rest.get("dummy_run"):
            return self._propose(*inputs, num_sampled, *args, **rest)
        drafter, slots = self._speculator, input_batch.idx_mapping
        total = drafter.req_states.total_len.gpu[slots]
        # A request that comes back from a preemption samples nothing before its last token, which is known.
        resumed = input_batch.seq_lens[: input_batch.num_reqs] == total - 1
        num_sampled = torch.where(resumed, 1, num_sampled)
        drafts = self._propose(*inputs, num_sampled, *args, **rest)
        # as the drafter's kernel reads it: length of the match x (L + 1) + its position + 1, 0 for no match
        score = drafter.scratch[: input_batch.num_reqs].amax(1)
        length, position = (score - 1) // (drafter.max_model_len + 1), (score - 1) % (drafter.max_model_len + 1)
        self._found[slots] = torch.where((score > 0) & (num_sampled > 0), total - length - position, 0)
        return drafts

    def absent(self, batch: Any, arbitrated: Tensor) -> Tensor:
        """Return which rows of an InputBatch hold no draft that was found, of arbitrated requests; bool [num_rows]."""
        slots = batch.expanded_idx_mapping
        return (batch.expanded_local_pos > self._found[slots]) & (arbitrated[slots] != 0)


def protect(speculator: Any, context: int, max_model_len: int) -> None:
    """Keep a separate draft model within its bounds; other drafters share the target's positions and guard themselves.

    Args:
        speculator: the runner's.
        context: positions the draft model has.
        max_model_len: positions it is fed.
    """
    if isinstance(speculator, StandaloneARSpeculator):
        if context < max_model_len:
            _clamp_positions(speculator, context)
        _leave_caches_alone_in_dummy_runs(speculator)


def _clamp_positions(drafter: Any, context: int) -> None:
    """Feed no position beyond the tables of positions. Drafts made there are strict; the cache keeps its places."""

    def within_context(input_ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        return run_model(input_ids, positions.clamp(max=context - 1), *rest)

    run_model = compat.wrap(f"{hooks.V2_STANDALONE}._run_model", drafter, within_context)


def _leave_caches_alone_in_dummy_runs(drafter: Any) -> None:
    """Let the dummy runs of a data-parallel rank without work write into no slot's cache and logits."""

    def leaving_caches_alone(*args: Any, **options: Any) -> Tensor:
        if not options.get("dummy_run"):
            return propose(*args, **options)
        tables, copy = getattr(drafter, "block_tables", None), drafter._copy_request_inputs
        drafter.block_tables = _NoSlots(tables)
        drafter._copy_request_inputs = functools.partial(copy, dummy_run=True)
        try:
            return propose(*args, **options)
        finally:
            drafter.block_tables = tables
            drafter._copy_request_inputs = copy

    propose = compat.wrap(f"{hooks.V2_STANDALONE}.propose", drafter, leaving_caches_alone)


class _NoSlots:
    """Block tables that map every token nowhere."""

    def __init__(self, tables: Any):
        self._tables = tables

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    def compute_slot_mappings(
        self, idx_mapping: Tensor, query_start_loc: Tensor, positions: Tensor, num: int, out: Tensor | None = None
    ) -> Tensor:
        nowhere = self._tables.get_dummy_slot_mappings(num)
        return nowhere if out is None else out[:, :num].fill_(PAD_SLOT_ID)
