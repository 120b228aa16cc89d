"""What the training's engine does around vLLM, without starting one."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from vllm_cospec.training.artefact import artefact_config
from vllm_cospec.training.config import PairConfig, bundled
from vllm_cospec.training.rollout.engine import Engine

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %};{% endif %}"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_go_through_the_chat_template_where_there_is_one(template: str | None) -> None:
    engine = Engine.__new__(Engine)
    engine._tokenizer = AutoTokenizer.from_pretrained(bundled("target"))
    engine._tokenizer.chat_template = template
    tokens = engine.encode("12+3?")
    assert all(isinstance(token, int) for token in tokens)
    assert engine.decode(tokens) == ("12+3?" if template is None else "12+3?;")


def test_an_arbiter_is_described_by_the_pair_it_is_for() -> None:
    target, draft = str(bundled("target")), str(bundled("draft"))
    pair = PairConfig(target=target, draft=draft, num_speculative_tokens=7)
    config = artefact_config(pair, (32, 32))
    assert (config.provenance.target, config.provenance.draft) == ("demo/target", "demo/draft")
    assert config.provenance.vocab_size == 100
    assert config.schema_id.draft_logits
    ngram = PairConfig(target=target, draft_method="ngram", num_speculative_tokens=7)
    assert not artefact_config(ngram, (32,)).schema_id.draft_logits
