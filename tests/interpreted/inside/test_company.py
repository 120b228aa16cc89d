"""A request's text is a function of the request and the server's settings, whatever runs beside it.

On interpreted V2, and on V1 with the path for GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from company import mixed_requests, short_draft
from processes import DEMO, OUTGROWS_DRAFT, generate

pytestmark = pytest.mark.engine

# room for three blocks of drafts in a step, and in the cache for two long requests or a few short ones
PRESSED: dict[str, Any] = {
    "block_size": 32, "max_num_seqs": 6, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 9
}  # fmt: skip


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled draft with half its context."""
    return short_draft(DEMO, tmp_path_factory.mktemp("draft") / "draft")


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("v1", "count"),
    [
        pytest.param(False, 15, id="v2"),
        pytest.param(True, 15, id="v1 on a device"),
        pytest.param(False, 60, id="v2, large", marks=pytest.mark.slow),
        pytest.param(True, 60, id="v1 on a device, large", marks=pytest.mark.slow),
    ],
)
def test_requests_in_company_get_the_texts_they_get_alone(v1: bool, count: int, draft: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, **params} for prompt, params in mixed_requests(count, seed=11, max_tokens=20)
    ]
    outgrows = v1 or OUTGROWS_DRAFT
    run = generate(
        {
            "method": "cospec", "model": str(draft if outgrows else DEMO / "draft"), "num_speculative_tokens": 7,
            "collect": True,
        },
        [*([entry] for entry in entries), entries],
        v1=v1,
        between_steps={"reset": 20, "pause": 10, "guests": 12},
        **PRESSED,
    )  # fmt: skip
    assert run["sampler"] == f"vllm_cospec.runners.{'v1_gpu' if v1 else 'v2'}"
    alone, company = [texts[0] for texts in run["tokens"][:count]], run["tokens"][count]
    differing = {i: (entries[i], alone[i], company[i]) for i in range(count) if alone[i] != company[i]}
    assert differing == {}
    assert run["metrics"]["vllm:num_preemptions"] > 0
    assert sum(d["kept"] for d in run["decisions"]) > count / 4
    assert set(run["unhealthy"]) == ({"context"} if outgrows else set())


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1 on a device"])
def test_ngram_and_a_rule_in_company(v1: bool) -> None:
    entries: list[dict[str, Any]] = [
        {"prompt": prompt, **params} for prompt, params in mixed_requests(12, seed=3, max_tokens=20, grammar=False)
    ]
    run = generate(
        {
            "method": "cospec", "draft_method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4,
            "arbiter": {"policy": "random", "rate": 0.6}, "collect": True,
        },
        [*([entry] for entry in entries), entries],
        v1=v1,
        **PRESSED,
    )  # fmt: skip
    assert run["tokens"][len(entries)] == [texts[0] for texts in run["tokens"][: len(entries)]]
    assert run["metrics"]["vllm:num_preemptions"] > 0
    assert run["unhealthy"] == {}
