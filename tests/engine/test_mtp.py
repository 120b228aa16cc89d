"""A multi-token-prediction layer, as far as random weights show: it loads, it is arbitrated, strict is stock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heads import random_target

RunEngine = Callable[..., dict[str, Any]]
GREEDY = {"temperature": 0, "max_tokens": 30}


@pytest.mark.engine
def test_an_mtp_layer_is_arbitrated(pair: Path, prompts: list[str], run_engine: RunEngine, tmp_path: Path) -> None:
    target = str(random_target(tmp_path / "mimo", pair))
    run = {"name": "run", "prompts": prompts[:40], "params": GREEDY}
    stock = run_engine([run], {"method": "mtp", "num_speculative_tokens": 2}, model=target)
    cospec = {
        "method": "cospec", "draft_method": "mtp", "num_speculative_tokens": 2, "collect": True,
        "arbiter": {"policy": "random", "rate": 0.3},
    }  # fmt: skip
    strict = run | {"name": "strict", "params": GREEDY | {"extra_args": {"cospec_policy": "strict"}}}
    found = run_engine([strict, run], cospec, model=target)
    assert found["runs"]["strict"] == stock["runs"]["run"]
    assert found["metrics"]["vllm:cospec_num_overrides"] > 0
    assert found["decisions"]
