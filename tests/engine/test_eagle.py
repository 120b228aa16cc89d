"""EAGLE and EAGLE-3 heads, as far as random weights show: they load, their drafts are arbitrated, strict is stock.

A random head proposes nonsense, so nothing can be said about acceptance; what is shown is that its logits are kept for
the right rows and that verification is what it should be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heads import random_head

RunEngine = Callable[..., dict[str, Any]]
GREEDY = {"temperature": 0, "max_tokens": 30}


@pytest.mark.engine
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_heads_are_arbitrated(
    method: str, pair: Path, prompts: list[str], run_engine: RunEngine, tmp_path: Path
) -> None:
    head = random_head(tmp_path / method, pair, eagle3=method == "eagle3")
    keys = {"model": str(head), "num_speculative_tokens": 3}
    run = {"name": "run", "prompts": prompts[:40], "params": GREEDY}
    stock = run_engine([run], {"method": method, **keys})
    cospec = {"method": "cospec", "draft_method": method, "arbiter": {"policy": "random", "rate": 0.3}, "collect": True}
    strict = run | {"name": "strict", "params": GREEDY | {"extra_args": {"cospec_policy": "strict"}}}
    found = run_engine([strict, run], cospec | keys)
    assert found["runs"]["strict"] == stock["runs"]["run"]
    assert found["metrics"]["vllm:cospec_num_overrides"] > 0
    assert found["decisions"]
