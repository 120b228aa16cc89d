"""A multi-token-prediction layer, as far as random weights show: it loads, it is arbitrated, strict is stock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heads import random_target

RunEngine = Callable[..., dict[str, Any]]


@pytest.mark.engine
def test_an_mtp_layer_is_arbitrated(pair: Path, prompts: list[str], run_engine: RunEngine, tmp_path: Path) -> None:
    target = str(random_target(tmp_path / "mimo", pair))
    runs = [{"name": "run", "prompts": prompts[:40], "params": {"temperature": 0, "max_tokens": 30}}]
    stock = run_engine(runs, {"method": "mtp", "num_speculative_tokens": 2}, model=target)
    cospec = {"method": "cospec", "draft_method": "mtp", "num_speculative_tokens": 2}
    strict = run_engine(runs, cospec | {"arbiter": {"policy": "strict"}}, model=target)
    assert strict["runs"] == stock["runs"]
    some = run_engine(runs, cospec | {"arbiter": {"policy": "random", "rate": 0.3}, "collect": True}, model=target)
    assert some["metrics"]["vllm:cospec_num_overrides"] > 0
    assert some["decisions"]
