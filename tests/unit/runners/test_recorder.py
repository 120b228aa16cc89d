"""What was proposed waits until it is verified: one block for each request that runs, and nothing of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_cospec.runners.recorder import Recorder

VOCAB = 5


def recorder_of(requests: str) -> Any:
    """A recorder whose runner has these requests; its drafter gives no probabilities."""
    recorder: Any = Recorder.__new__(Recorder)
    recorder._runner = SimpleNamespace(requests=dict.fromkeys(requests), input_batch=SimpleNamespace(req_ids=[]))
    recorder._drafter, recorder._blocks, recorder._of_others = SimpleNamespace(), {}, None
    return recorder


def propose(recorder: Any, requests: str, token: int) -> None:
    """Run a drafter that proposes this token twice to each of the requests, with logits like it."""
    recorder._runner.input_batch.req_ids = list(requests)
    recorder.begin([True] * len(requests))
    recorder._current.logits += [torch.full((len(requests), VOCAB), float(token)) for _ in range(2)]
    recorder.end(torch.full((len(requests), 2), token))


def test_a_block_that_waits_keeps_its_own_logits_and_lets_go_of_the_others() -> None:
    recorder = recorder_of("abc")
    propose(recorder, "abc", 1)
    propose(recorder, "b", 2)
    waiting, latest = recorder.take(["a", "b"])
    assert waiting.tokens == [1, 1]
    assert latest.tokens == [2, 2]
    for position in (0, 1):
        assert waiting.logits(position).tolist() == [1.0] * VOCAB
        assert waiting.logits(position).untyped_storage().nbytes() == VOCAB * 4  # one row of three
    assert waiting.reason is latest.reason is None


def test_at_most_one_block_is_kept_for_each_request_that_runs() -> None:
    recorder = recorder_of("abc")
    for token in range(4):
        propose(recorder, "abc", token)
        assert sorted(recorder._blocks) == ["a", "b", "c"]
    del recorder._runner.requests["c"]
    propose(recorder, "a", 4)
    assert sorted(recorder._blocks) == ["a", "b"]
    assert recorder.take(["a", "b", "c"])[2] is None
    assert recorder._blocks == {}
