"""Requests are watched for drift on both device runners, and an alarm makes verification strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import DEMO, generate

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, Provenance, current_schema, save_artefact, tokenizer_hash
from vllm_cospec.calibration import Conditions, Statement
from vllm_cospec.drift import Range, Traffic
from vllm_cospec.kernels.scores import NUM_BINS

pytestmark = pytest.mark.engine

PROMPTS = ["2+3*4?", "(7-2)*3?", "12+9-4?", "8*8+1?"]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained arbiter that keeps every draft; its calibration has seen requests with hardly a mismatch."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(DEMO / "target").get_vocab()
    rare, any_share = (
        Range(mean=0.001, deviation=0.001, low=0.01, high=0.02),
        Range(mean=0.1, deviation=1, low=0, high=1),
    )
    config = ArtefactConfig(
        schema=current_schema(draft_logits=True),
        hidden_sizes=(16,),
        threshold=0.0,  # keeps all
        provenance=Provenance(
            vocab_size=json.loads((DEMO / "target" / "config.json").read_text())["vocab_size"],
            tokenizer_hash=tokenizer_hash(vocabulary),
        ),
        statement=Statement(
            level=0.95, test="exact", max_accuracy_loss=0.01, speed_weight=0.05, task="made up", task_hash="0",
            conditions=Conditions(
                draft="0", num_speculative_tokens=3, dtype="float32", chat_template="", temperature=(0, 0), top_p=(1, 1)
            ),
            traffic=Traffic(
                requests=1000, tokens=any_share, mismatches_per_token=rare, overrides_per_mismatch=any_share,
                scores=(any_share,) * NUM_BINS,
            ),
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("arbiter") / "arbiter"
    save_artefact(directory, Arbiter((16,)), config, "untrained")
    return directory


def requests(**more: Any) -> list[dict[str, Any]]:
    return [{"prompt": p, "temperature": 0.0, "max_tokens": 10, "ignore_eos": True, **more} for p in PROMPTS]


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
def test_an_alarm_makes_verification_strict_on_a_device(v1: bool, artefact: Path) -> None:
    strict = {"extra_args": {"cospec_policy": "strict"}}
    batches = [requests(**strict), *(requests() for _ in range(4))]
    result = generate({"method": "cospec", "arbiter": str(artefact), "on_drift": "strict"}, batches, v1=v1)
    exact, first, *_, last = result["tokens"]
    assert first != exact
    assert last == exact
    assert result["metrics"]["vllm:cospec_num_drift_alarms"] == 1
    assert sum(result["counters"][:-1]) > 3
