"""Nothing made for something else gets in."""

from typing import Any

import pytest
from artefacts import VOCABULARY, make_config, refusal

from vllm_cospec.arbiter import check_fit, tokenizer_hash


def test_an_artefact_fits_what_it_was_trained_for() -> None:
    check_fit(make_config(), "here", True, tokenizer_hash(VOCABULARY))
    check_fit(make_config(draft_logits=False), "here", False, tokenizer_hash(VOCABULARY))


@pytest.mark.parametrize(
    ("trained_with", "draft_logits", "vocabulary", "named"),
    [
        (True, False, VOCABULARY, ["with draft logits", "none"]),
        (False, True, VOCABULARY, ["without draft logits", "them"]),
        (True, True, {"a": 0, "b": 2, "<eos>": 1}, ["tokenizer", tokenizer_hash(VOCABULARY)]),
    ],
)
def test_an_artefact_made_for_something_else_is_refused(
    trained_with: Any, draft_logits: Any, vocabulary: Any, named: Any
) -> None:
    config = make_config(draft_logits=trained_with)
    message = refusal(
        lambda: check_fit(config, "path/of/it", draft_logits, tokenizer_hash(vocabulary)),
    )
    assert all(part in message for part in ["path/of/it", *named]), message


def test_tokenizer_hash_is_of_the_vocabulary_and_not_of_its_order() -> None:
    assert tokenizer_hash(VOCABULARY) == tokenizer_hash(dict(reversed(VOCABULARY.items())))
    others = [{**VOCABULARY, "c": 3}, {"a": 1, "b": 0, "<eos>": 2}, {"A": 0, "b": 1, "<eos>": 2}, {}]
    assert len({tokenizer_hash(vocabulary) for vocabulary in [VOCABULARY, *others]}) == 5
    assert len(tokenizer_hash({"\udce9 é 日本": 0})) == 16  # byte-level vocabularies hold anything
