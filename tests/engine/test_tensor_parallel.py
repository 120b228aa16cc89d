"""Two ranks that decide alike count once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_cospec.training.pairs.demo import PLANS, build_model, build_tokenizer

RunEngine = Callable[..., dict[str, Any]]


def write_model(directory: Path, seed: int) -> Path:
    """A random model whose heads two ranks can share; its own output matrix keeps it from repeating its last token."""
    tokenizer = build_tokenizer()
    shape = dataclasses.replace(
        PLANS["draft"], seed=seed, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2
    )
    model = build_model(shape, len(tokenizer))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_two_ranks_count_as_one(
    tmp_path: Path, prompts: list[str], run_engine: RunEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM gives each rank a NUMA node of its own otherwise
    target, draft = write_model(tmp_path / "target", 1), write_model(tmp_path / "draft", 2)
    # chosen so that draft and target disagree almost always, and half of the drafts are kept
    config = {
        "method": "cospec", "model": str(draft), "num_speculative_tokens": 4,
        "arbiter": {"policy": "random", "rate": 0.5},
    }  # fmt: skip
    runs = [
        {"name": "run", "prompts": prompts[:20], "params": {"temperature": 0, "max_tokens": 40, "ignore_eos": True}}
    ]
    one, two = (run_engine(runs, config, model=str(target), tensor_parallel_size=ranks) for ranks in (1, 2))
    assert one["runs"] == two["runs"]
    counted = {name: value for name, value in one["metrics"].items() if name.startswith("vllm:cospec")}
    assert counted == {name: value for name, value in two["metrics"].items() if name.startswith("vllm:cospec")}
    assert counted["vllm:cospec_num_overrides"] > 100
    accepted = two["metrics"]["vllm:spec_decode_num_accepted_tokens"]
    assert counted["vllm:cospec_num_overrides"] <= accepted
