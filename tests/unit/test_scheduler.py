"""Where the scheduler stops a request in a step: never inside a block it could verify whole, alone or later."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_cospec.scheduler import Behind, foreign_blocks, keeping_blocks_whole

K = 5


def full_attention(block_size: int) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=8, dtype=torch.float32)


class Scheduler:
    """As much of vLLM's scheduler as is extended."""

    num_sampled_tokens_per_step = 1
    num_spec_tokens = K
    block_size = 4
    use_v2_model_runner = False

    def __init__(
        self,
        max_tokens: int = 64,
        long_prefill: int = 0,
        max_model_len: int = 128,
        connector: Any = None,
        heads: bool = False,
    ) -> None:
        self.scheduler_config = SimpleNamespace(
            long_prefill_token_threshold=long_prefill, max_num_batched_tokens=max_tokens
        )
        self.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(max_num_new_slots_for_drafting=1, use_eagle=lambda: heads)
        )
        self.cache_config = SimpleNamespace(enable_prefix_caching=False)
        self.kv_cache_config = SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=full_attention(size)) for size in (4, 8)]
        )
        self.connector = connector
        self.max_num_scheduled_tokens = max_tokens
        self.max_model_len = max_model_len
        self.requests: dict[str, Any] = {}
        self.hit = 0
        self.diverged = False
        self.kv_cache_manager = SimpleNamespace(
            empty_kv_cache_blocks="none",
            truncate_computed_blocks=lambda blocks, n: f"{blocks} up to {n}",
            get_computed_blocks=lambda request: ("blocks of every group", 8, 0),
        )

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        return num_new_tokens

    def _preempt_request(self, request: Any, timestamp: float) -> None:
        request.num_computed_tokens, request.spec_token_ids = 0, []

    def _get_local_prefix_cache_hit(self, request: Any) -> tuple[str, int, int, bool]:
        return "blocks", self.hit, 0, self.diverged

    def _handle_stopped_request(self, request: Any) -> bool:
        request.spec_token_ids = []
        return False

    def _handle_invalid_blocks(self, block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> set[str]:
        for name in num_scheduled_tokens:
            self.requests[name].num_computed_tokens = 4
        return set(num_scheduled_tokens)

    def update_draft_token_ids(self, drafts: Any) -> None:
        for name, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
            request = self.requests.get(name)
            if request is not None:
                request.spec_token_ids = [] if request.is_prefill_chunk else tokens

    def _update_after_schedule(self, output: Any) -> None:
        pass


def request(prompt: int = 10, output: int = 0, computed: int = 0, drafts: int = 0) -> Any:
    own = SimpleNamespace(
        num_tokens=prompt + output, num_output_tokens=output, num_computed_tokens=computed,
        num_output_placeholders=0, spec_token_ids=[7] * drafts, is_prefill_chunk=computed < prompt + output - 1,
        request_id="a", mm_features=[],
    )  # fmt: skip
    own.num_tokens_with_spec = own.num_tokens + drafts
    return own


def scheduler(**settings: Any) -> Any:
    return keeping_blocks_whole(Scheduler)(**settings)


@pytest.mark.parametrize(("offered", "granted"), [(6, 6), (5, 0), (1, 0)])
def test_a_block_that_does_not_fit_waits(offered: int, granted: int) -> None:
    own = request(output=3, computed=12, drafts=K)
    assert scheduler()._reserve_prefill_lookahead(own, 12, offered) == granted


def test_a_block_is_cut_where_it_would_be_cut_alone() -> None:
    small = scheduler(max_tokens=5)  # of which the drafter needs one
    own = request(output=3, computed=12, drafts=K)
    assert small._reserve_prefill_lookahead(own, 12, 4) == 4
    assert small._reserve_prefill_lookahead(own, 12, 3) == 0
    end = scheduler(max_model_len=16)
    assert end._reserve_prefill_lookahead(own, 12, 3) == 3
    assert end._reserve_prefill_lookahead(own, 12, 2) == 0


def test_a_prompt_takes_what_it_is_given() -> None:
    assert scheduler()._reserve_prefill_lookahead(request(prompt=40), 0, 7) == 7
    assert scheduler()._reserve_prefill_lookahead(request(prompt=40), 33, 7) == 7


@pytest.mark.parametrize(("heads", "chunk", "granted"), [(True, 8, 7), (True, 9, 9), (True, 1, 1), (False, 8, 8)])
def test_a_chunk_for_a_head_does_not_end_before_an_image(heads: bool, chunk: int, granted: int) -> None:
    """It would be fed the image's placeholder with the last token, and keep that."""
    own = request(prompt=40)
    own.mm_features = [SimpleNamespace(mm_position=SimpleNamespace(offset=offset)) for offset in (2, 8)]
    assert scheduler(heads=heads)._reserve_prefill_lookahead(own, 8 - chunk if chunk < 9 else 0, chunk) == granted


def test_the_threshold_for_long_prompts_does_not_cut_blocks() -> None:
    assert scheduler(long_prefill=3).scheduler_config.long_prefill_token_threshold == 1 + K
    assert scheduler(long_prefill=30).scheduler_config.long_prefill_token_threshold == 30
    assert scheduler(long_prefill=0).scheduler_config.long_prefill_token_threshold == 0


def test_a_preempted_request_is_drafted_again_before_it_decodes() -> None:
    own, it = request(output=3, computed=12, drafts=K), scheduler()
    it.requests["a"] = own
    it._preempt_request(own, 0.0)
    own.is_prefill_chunk = True
    assert it._reserve_prefill_lookahead(own, 0, 8) == 8  # a chunk like any other
    assert it._reserve_prefill_lookahead(own, 8, 5) == 4  # the last token waits
    drafts = SimpleNamespace(req_ids=["a", "gone"], draft_token_ids=[[1, 2, 3], [4]])
    own.num_computed_tokens = 8
    it.update_draft_token_ids(drafts)
    assert own.spec_token_ids == []
    own.num_computed_tokens = 12
    it.update_draft_token_ids(drafts)
    assert own.spec_token_ids == [1, 2, 3]
    own.num_tokens_with_spec = 16
    assert it._reserve_prefill_lookahead(own, 12, 4) == 4
    own.spec_token_ids = []
    assert it._reserve_prefill_lookahead(own, 12, 1) == 1  # decoding goes on, with drafts or without


def test_a_request_preempted_in_its_prompt_has_no_block_to_draft_again() -> None:
    own, it = request(computed=4), scheduler()
    it._preempt_request(own, 0.0)
    assert it._reserve_prefill_lookahead(own, 0, 10) == 10


def test_nothing_waits_for_ever() -> None:
    """One token left and nothing drafted for it: the request goes on without a block."""
    own, it = request(output=3, computed=12), scheduler()
    it._preempt_request(own, 0.0)
    assert it._reserve_prefill_lookahead(own, 12, 1) == 1


@pytest.mark.parametrize(
    ("hit", "expected"), [(8, ("blocks", 8)), (12, ("blocks up to 8", 8)), (11, ("blocks", 11)), (0, ("blocks", 0))]
)
def test_a_cache_hit_leaves_more_than_the_last_token(hit: int, expected: tuple[str, int]) -> None:
    own, it = request(output=3), scheduler()
    it._preempt_request(own, 0.0)
    it.hit = hit
    assert it._get_local_prefix_cache_hit(own)[:2] == expected


def test_a_hit_inside_a_block_that_leaves_the_last_token_alone_is_cut_to_whole_blocks() -> None:
    own, it = request(output=2), scheduler()
    it._preempt_request(own, 0.0)
    it.hit = 11
    assert it._get_local_prefix_cache_hit(own)[:2] == ("blocks up to 8", 8)


def test_a_hit_is_given_up_where_it_cannot_be_cut() -> None:
    own, it = request(output=3), scheduler()
    it.kv_cache_config.kv_cache_groups[1].kv_cache_spec = SlidingWindowSpec(
        block_size=8, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8
    )
    it._preempt_request(own, 0.0)
    it.hit = 12
    assert it._get_local_prefix_cache_hit(own)[:2] == ("none", 0)


def test_a_hit_that_goes_deeper_in_some_groups_is_looked_up_again_where_it_may_have_to_be_cut() -> None:
    """vLLM looks again itself, past what is cut here, when a connector has nothing to add."""
    own, it = request(output=3), scheduler()
    it.hit, it.diverged = 12, True
    assert it._get_local_prefix_cache_hit(own) == ("blocks", 12, 0, True)
    it._preempt_request(own, 0.0)
    assert it._get_local_prefix_cache_hit(own) == ("blocks of every group", 8, 0, False)


def test_drafts_behind_a_token_that_is_taken_back_are_ignored() -> None:
    own, other, it = request(computed=10), request(computed=10, output=1), scheduler()
    own.is_prefill_chunk = other.is_prefill_chunk = False
    it.requests |= {"a": own, "b": other}
    assert it._handle_invalid_blocks({3}, {"a": 6}) == {"a"}
    it.update_draft_token_ids(SimpleNamespace(req_ids=["a", "b"], draft_token_ids=[[1, 2], [3, 4]]))
    assert own.spec_token_ids == []
    assert other.spec_token_ids == [3, 4]


def test_drafts_behind_a_stop_are_not_kept_for_what_comes_in_next() -> None:
    own, it = request(output=3, computed=12, drafts=K), scheduler()
    own.is_prefill_chunk = False
    it.requests["a"] = own
    assert not it._handle_stopped_request(own)
    it.update_draft_token_ids(SimpleNamespace(req_ids=["a"], draft_token_ids=[[1, 2, 3]]))
    assert own.spec_token_ids == []


def test_a_head_stands_on_blocks_that_go_on_as_its_own_text_does() -> None:
    def text(*tokens: int) -> Any:
        return SimpleNamespace(
            all_token_ids=list(tokens), block_hashes=[bytes([i]) * 32 for i in range(len(tokens) // 2)]
        )

    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=2)
    behind = Behind(pool, num_tokens=1)
    blocks, author = pool.get_new_blocks(3), text(1, 2, 3, 4, 5, 6)
    pool.cache_full_blocks(author, blocks, 0, 3, block_size=2, kv_cache_group_id=0)
    assert behind.num_own(text(1, 2, 3, 4, 5, 6, 7), blocks, 2) == 2  # what follows the third is not known yet
    author.all_token_ids.append(7)
    assert behind.num_own(text(1, 2, 3, 4, 5, 6, 7), blocks, 2) == 3
    assert behind.num_own(text(1, 2, 3, 4, 5, 6, 8), blocks, 2) == 2
    assert behind.num_own(text(1, 2, 3, 4, 9, 6, 7), blocks, 2) == 1
    assert behind.num_own(text(1, 2, 3, 4, 5, 6), blocks, 2) == 2  # nothing of its own behind it
    assert behind.num_own(author, [pool.null_block, *blocks[1:]], 2) == 3
    assert behind.num_own(author, pool.get_new_blocks(1), 2) == 0  # whose text is not known


def test_where_drafts_stay_in_the_worker_placeholders_stand_for_them() -> None:
    own, it = request(output=3, computed=12), scheduler()
    it._spec_token_placeholders = [-1] * K
    it.requests["a"] = own
    it._preempt_request(own, 0.0)
    own.num_computed_tokens = 12
    it._update_after_schedule(SimpleNamespace(num_scheduled_tokens={"a": 12}))
    assert own.spec_token_ids == [-1] * K


def test_blocks_a_connector_fills_are_handed_to_the_workers_once() -> None:
    class Connector:
        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            told.append((request, num_external_tokens))

    told: list[tuple[Any, int]] = []
    own = request(prompt=30)
    it = scheduler(connector=Connector())
    it.hit = 8
    it._get_local_prefix_cache_hit(own)
    blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4, 5], [6, 7, 8]))
    it.connector.update_state_after_alloc(own, blocks, 0)
    it.connector.update_state_after_alloc(own, blocks, 12)
    assert told == [(own, 0), (own, 12)]
    output = SimpleNamespace(num_scheduled_tokens={})
    it._update_after_schedule(output)
    assert [foreign_blocks(output, group) for group in (0, 1)] == [[3, 4, 5], [7, 8]]
    output = SimpleNamespace(num_scheduled_tokens={})
    it._update_after_schedule(output)
    assert foreign_blocks(output, 0) == []


def test_a_class_is_extended_once() -> None:
    assert keeping_blocks_whole(Scheduler) is keeping_blocks_whole(Scheduler)
    assert keeping_blocks_whole(Scheduler).__name__ == "Scheduler"
