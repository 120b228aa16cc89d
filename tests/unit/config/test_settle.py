"""What fits what: drafter, vocabulary, arbiter, threshold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configurations import Pair, assert_one_sentence, learned, write_artefact

from vllm_cospec.config import CoSpecConfig, Settings
from vllm_cospec.errors import ArtefactError, ConfigError
from vllm_cospec.kernels.policies import Cascade, Fly, Kl, Strict, Typical
from vllm_cospec.settle import settle
from vllm_cospec.training.pairs.demo import build_tokenizer


def settled(
    arbiter: Any = None,
    *,
    method: str = "draft_model",
    tokens: int = 5,
    target_vocab: int = 100,
    draft_vocab: int = 100,
    vocabulary: Callable[..., Any] | None = None,
    **own: Any,
) -> Settings:
    return settle(
        CoSpecConfig(arbiter=arbiter or Typical(), **own),
        method,
        tokens,
        target_vocab,
        draft_vocab,
        vocabulary or build_tokenizer().get_vocab,
        "counters",
    )


def test_settings_carry_every_field() -> None:
    assert settled(max_overrides=4, exact_tokens=8, collect=True) == Settings(
        policy=Typical(),
        threshold=0.5,
        max_overrides=4,
        exact_tokens=8,
        collect=True,
        draft_logits=True,
        num_speculative_tokens=5,
        counters="counters",
    )


@pytest.mark.parametrize(
    ("method", "draft_logits"),
    [("draft_model", True), ("eagle", True), ("eagle3", True), ("mtp", True), ("ngram", False), ("suffix", False)],
)
def test_drafters_with_and_without_logits_are_told_apart(method: str, draft_logits: bool) -> None:
    assert settled(method=method).draft_logits is draft_logits


@pytest.mark.parametrize("method", ["medusa", "mlp_speculator", "dflash", "dspark", "custom_class", "ngram_gpu"])
def test_a_drafter_that_vllm_detects_and_we_do_not_know_is_refused(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settled(method=method)
    assert_one_sentence(caught.value, f"speculative_config.draft_method: vLLM detected '{method}'")


def test_a_draft_model_with_another_vocabulary_is_refused_and_other_drafters_are_not_compared() -> None:
    with pytest.raises(ConfigError, match=r"speculative_config\.model: .* 101 tokens, the target of 100"):
        settled(draft_vocab=101)
    for method in ("eagle", "ngram"):
        settled(method=method, draft_vocab=0)


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_kl_needs_draft_logits(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"speculative_config\.arbiter: .*'kl' needs draft logits.*'{method}'"):
        settled(Kl(max_kl=1), method=method)
    assert settled(Kl(max_kl=1)).policy == Kl(max_kl=1)


@pytest.mark.parametrize(("tokens", "window"), [(2, 1), (3, 2), (5, 4), (7, 6), (8, 6), (16, 6)])
def test_the_window_of_fly_is_at_most_six_and_fits_the_block(tokens: int, window: int) -> None:
    assert settled(Fly(entropy_top_k=5), tokens=tokens).policy == Fly(entropy_top_k=5, window=window)


def test_an_explicit_window_of_fly_stays() -> None:
    assert settled(Fly(window=2), tokens=8).policy == Fly(window=2)
    assert settled(Fly(window=7), tokens=8).policy == Fly(window=7)


@pytest.mark.parametrize(("window", "tokens"), [(None, 1), (1, 1), (5, 5), (127, 5)])
def test_a_window_of_fly_that_no_block_can_fill_is_refused(window: int | None, tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"arbiter\.window: .*num_speculative_tokens={tokens}"):
        settled(Fly(window=window), tokens=tokens)


@pytest.mark.parametrize(
    ("knobs", "threshold"),
    [
        ({}, 0.7),  # the artefact's
        ({"threshold": 0.1}, 0.1),
        ({"threshold": 0.0}, 0.0),
        ({"threshold": 1}, 1.0),
        ({"max_accuracy_loss": 0.2}, 0.3),  # all points qualify: the longest acceptance length
        ({"max_accuracy_loss": 0.1}, 0.6),  # the bound of the first point, 0.12, is too large
        ({"max_accuracy_loss": 0.02}, 0.8),  # only the last point's bound, 0.01, is below
    ],
)
def test_the_threshold_of_a_trained_arbiter(pair: Pair, knobs: dict[str, Any], threshold: float) -> None:
    assert settled(learned(pair.artefact), **knobs).threshold == threshold


def test_a_loss_that_no_threshold_keeps_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError) as caught:
        settled(learned(pair.artefact), max_accuracy_loss=0.001)
    assert_one_sentence(caught.value, "max_accuracy_loss")
    with pytest.raises(ArtefactError) as caught:
        settled(learned(write_artefact(tmp_path / "plain", calibration=())), max_accuracy_loss=0.5)
    assert_one_sentence(caught.value, "max_accuracy_loss")


def test_an_arbiter_that_does_not_fit_drafter_vocabulary_or_tokenizer_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="with draft logits"):
        settled(learned(pair.artefact), method="ngram")
    with pytest.raises(ArtefactError, match="without draft logits"):
        settled(learned(write_artefact(tmp_path / "a", draft_logits=False)))
    with pytest.raises(ArtefactError, match="vocabulary of 100 tokens, the target has 101"):
        settled(learned(pair.artefact), target_vocab=101, draft_vocab=101)
    with pytest.raises(ArtefactError, match="tokenizer"):
        settled(learned(pair.artefact), vocabulary=lambda: {"a": 0, "b": 1})
    settled(learned(write_artefact(tmp_path / "b", draft_logits=False)), method="ngram")


def test_rules_do_not_load_the_tokenizer() -> None:
    settled(Typical(), vocabulary=lambda: pytest.fail("loaded"))


def test_lossy_verification_is_announced_with_policy_threshold_and_artefact(pair: Pair) -> None:
    line = settled(learned(pair.artefact), threshold=0.125).announcement()
    assert "LOSSY" in line
    assert "learned" in line
    assert "0.125" in line
    assert str(pair.artefact) in line
    line = settled(Cascade(alpha=0.375)).announcement()
    assert "LOSSY" in line
    assert "cascade" in line
    assert "0.375" in line
    assert not settled(Strict()).lossy
    assert "LOSSY" not in settled(Strict()).announcement()
