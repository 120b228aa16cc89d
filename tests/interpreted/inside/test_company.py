"""A request's text is a function of the request and the server's settings, whatever runs beside it; interpreted V2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from company import mixed_requests
from processes import DEMO, generate

pytestmark = pytest.mark.engine

COUNT = 60
# room for three blocks of drafts in a step, and in the cache for two long requests or a few short ones
PRESSED: dict[str, Any] = {
    "block_size": 32, "max_num_seqs": 6, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 9
}  # fmt: skip


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled draft with half its context."""
    directory = tmp_path_factory.mktemp("draft") / "draft"
    shutil.copytree(DEMO / "draft", directory)
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 64
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_sixty_requests_in_company_get_the_texts_they_get_alone(draft: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, **params} for prompt, params in mixed_requests(COUNT, seed=11, max_tokens=20)
    ]
    run = generate(
        {"method": "cospec", "model": str(draft), "num_speculative_tokens": 7, "collect": True},
        [*([entry] for entry in entries), entries],
        **PRESSED,
    )
    alone, company = [texts[0] for texts in run["tokens"][:COUNT]], run["tokens"][COUNT]
    differing = {i: (entries[i], alone[i], company[i]) for i in range(COUNT) if alone[i] != company[i]}
    assert differing == {}
    assert run["metrics"]["vllm:num_preemptions"] > 0
    assert sum(d["kept"] for d in run["decisions"]) > COUNT / 2
    assert set(run["unhealthy"]) == {"context"}


def test_ngram_and_a_rule_in_company() -> None:
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, **params} for prompt, params in mixed_requests(12, seed=3, max_tokens=20, grammar=False)
    ]
    run = generate(
        {
            "method": "cospec", "draft_method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4,
            "arbiter": {"policy": "random", "rate": 0.6}, "collect": True,
        },
        [*([entry] for entry in entries), entries],
        **PRESSED,
    )  # fmt: skip
    assert run["tokens"][len(entries)] == [texts[0] for texts in run["tokens"][: len(entries)]]
    assert run["metrics"]["vllm:num_preemptions"] > 0
    assert run["unhealthy"] == {}
