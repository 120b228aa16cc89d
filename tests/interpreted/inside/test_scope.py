"""Where drafts may be kept, on the paths for GPUs: the part of a response follows the tokens that were emitted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from company import is_thinking
from processes import generate
from v1_cases import IDS, VOCAB, Step, installed

from vllm_cospec.kernels.policies import Random
from vllm_cospec.runners import v1_cpu, v1_gpu
from vllm_cospec.runners.parts import Parts
from vllm_cospec.training.pairs.demo import build_tokenizer

KEEP_ALL = Random(rate=1.0)
BEGIN, END = (build_tokenizer().get_vocab()[digit] for digit in "12")


@pytest.mark.engine
@pytest.mark.parametrize("v1", [False, True])
def test_an_engine_keeps_drafts_in_their_scope_only(v1: bool) -> None:
    prompts = ["12+34*5?", "9*8+21?", "(7-2)*31?"]
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, "temperature": 0.0, "max_tokens": 24, "ignore_eos": True,
         "extra_args": {"cospec_scope": scope}}
        for scope in ("thinking", "answer")
        for prompt in prompts
    ]  # fmt: skip
    config = {
        "method": "cospec", "arbiter": {"policy": "random", "rate": 1.0}, "collect": True,
        "thinking_tokens": [BEGIN, END],
    }  # fmt: skip
    run = generate(config, [entries], v1=v1, max_num_seqs=3)
    kept: Counter[tuple[str, bool]] = Counter()
    for decision in run["decisions"]:
        number = int(decision["request"].split("-")[0])
        scope, tokens = entries[number]["extra_args"]["cospec_scope"], run["tokens"][0][number]
        if decision["position"] >= len(tokens):
            continue
        thinking = is_thinking(entries[number]["prompt"], tokens[: decision["position"]], BEGIN, END)
        kept[scope, thinking] += decision["kept"]
    assert kept["thinking", True] > 2
    assert kept["answer", False] > 2
    assert kept["thinking", False] == kept["answer", True] == 0


def test_on_v1_both_paths_keep_the_same_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(is_first_rank=True))
    scopes = dict(zip(IDS, ("thinking", "answer", "all", "thinking", "answer"), strict=True))
    extra = {name: {"cospec_scope": scope} for name, scope in scopes.items()}
    outputs, kept = [], []
    for module in (v1_cpu, v1_gpu):
        # many tokens stand for both markers, so that a block often holds one: every third token begins or ends
        runner, sampler = installed(module, KEEP_ALL, tmp_path, IDS, extra, thinking_tokens=(5, 6))
        steps = [_with_markers(Step(seed, IDS, sampled=0.5), seed) for seed in range(8)]
        outputs.append([runner.run(sampler, step).tolist() for step in steps])
        kept.append(sorted((d.request_id, d.output_position, d.kept) for d in sampler.take_decisions()))
    assert outputs[0] == outputs[1]
    assert kept[0] == kept[1]
    assert {scopes[name] for name, _, decided in kept[0] if decided} == {"thinking", "answer", "all"}


def _with_markers(step: Step, seed: int) -> Step:
    """Let many drafts be markers that strict verification accepts or a policy keeps."""
    generator, row = torch.Generator().manual_seed(seed), 0
    for i, n in enumerate(step.num_drafts[:-1]):
        for j in range(n):
            if float(torch.rand((), generator=generator)) < 0.3:
                token = 5 + int(torch.randint(2, (), generator=generator))
                step.proposed[i, j] = token
                step.drafts[sum(step.num_drafts[:i]) + j] = token
                step.logits[row + j, token] += 12.0
        row += n + 1
    return step


def test_a_token_that_was_missed_closes_both_scopes_until_the_next_marker() -> None:
    settings: Any = SimpleNamespace(thinking_tokens=(5, 6))
    parts = Parts(2, settings, torch.device("cpu"))
    parts.enter(0, "thinking", 3, [1, 5, 2, -1])  # one token of the response, which the host does not know yet
    slots = torch.tensor([0]).numpy()

    def closed(tokens: list[int], position: int) -> list[bool]:
        rows = len(tokens)
        found = parts.closed(
            slots, torch.tensor(tokens), torch.arange(rows), position + torch.arange(rows),
            torch.zeros(rows, dtype=torch.int64),
        )  # fmt: skip
        assert found is not None
        return found.tolist()

    def follow(rows: int, kept: int) -> None:
        parts.follow(torch.tensor([0, rows]), torch.tensor([0]), torch.tensor([kept]))

    assert closed([9, 6, 9], 3) == [False, True, True]
    follow(3, 0)  # the marker was a draft that was not kept
    assert closed([9, 9], 4) == [False, False]
    follow(2, 1)
    assert closed([9, 9], 8) == [True, True]  # positions 6 and 7 were never seen
    follow(2, 1)
    assert closed([5, 9], 10) == [False, False]
    assert VOCAB > 9
