"""What an artefact says about its pair, without an engine."""

from __future__ import annotations

from vllm_cospec.training.artefact import artefact_config
from vllm_cospec.training.config import PairConfig, bundled


def test_an_arbiter_is_described_by_the_pair_it_is_for() -> None:
    target, draft = str(bundled("target")), str(bundled("draft"))
    pair = PairConfig(target=target, draft=draft, num_speculative_tokens=7)
    config = artefact_config(pair, (32, 32))
    assert (config.provenance.target, config.provenance.draft) == ("demo/target", "demo/draft")
    assert config.provenance.vocab_size == 100
    assert config.schema_id.draft_logits
    ngram = PairConfig(target=target, draft_method="ngram", num_speculative_tokens=7)
    assert not artefact_config(ngram, (32,)).schema_id.draft_logits
