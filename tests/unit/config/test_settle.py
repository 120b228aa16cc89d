"""What fits what: drafter, vocabulary, arbiter, threshold."""

import re
from pathlib import Path
from typing import Any

import pytest
from configurations import CURVE, Pair, assert_one_sentence, conditions, learned, write_artefact
from vllm.reasoning import ReasoningParserManager

import vllm_cospec.demo
import vllm_cospec.settle as settle_module
from vllm_cospec.arbiter import load_artefact
from vllm_cospec.calibration import Conditions
from vllm_cospec.config import Calibrated, CoSpecConfig, Settings
from vllm_cospec.errors import ArtefactError, ConfigError
from vllm_cospec.kernels.policies import Cascade, Fly, Kl, Strict, Typical, policy_class, policy_names
from vllm_cospec.settle import Models, settle
from vllm_cospec.training.pairs.demo import build_tokenizer


def settled(
    arbiter: Any = None,
    *,
    method: str = "draft_model",
    tokens: Any = 5,
    target: Any = None,
    draft: Any = None,
    models: Any = None,
    served: Conditions | None = None,
    **own: Any,
) -> Any:
    compared = {} if served is None else {
        "num_speculative_tokens": served.num_speculative_tokens, "dtype": served.dtype,
        "draft_weights": lambda: served.draft,
    }  # fmt: skip
    values = {
        "method": method,
        "num_speculative_tokens": tokens,
        "target_vocab_size": 100,
        "draft_vocab_size": 100,
        "target_context": 64,
        "draft_context": 64,
        "target_tokenizer": target or build_tokenizer,
        "draft_tokenizer": draft or build_tokenizer,
        "dtype": "float32",
        "draft_weights": lambda: "",
        **compared,
    }
    return settle(CoSpecConfig(arbiter=arbiter or Typical(), **own), Models(**values | (models or {})), "counters")


class Tokenizer:
    """As much of a tokenizer as is compared."""

    def __init__(self, changes: Any = None, split: Any = None) -> None:
        self.vocabulary = build_tokenizer().get_vocab()
        self.split = split
        for token, token_id in (changes or {}).items():
            if token_id is None:
                del self.vocabulary[token]
            else:
                self.vocabulary[token] = token_id

    def get_vocab(self) -> Any:
        return self.vocabulary

    def encode(self, text: Any, add_special_tokens: Any) -> Any:
        return self.split or build_tokenizer().encode(text, add_special_tokens=add_special_tokens)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the operator is warned of."""
    said = []
    monkeypatch.setattr(settle_module.logger, "warning_once", lambda text, *args: said.append(text % args))
    return said


def test_settings_carry_every_field() -> None:
    found = settled(
        max_overrides=4, max_regret=1.5, exact_tokens=8, collect=True, request_settings=["policy", "max_regret"],
        scope="thinking", thinking_tokens=[7, 8],
    )  # fmt: skip
    assert found == Settings(
        policy=Typical(),
        threshold=0.5,
        max_overrides=4,
        max_regret=1.5,
        request_settings=("policy", "max_regret"),
        scope="thinking",
        thinking_tokens=(7, 8),
        exact_tokens=8,
        collect=True,
        draft_logits=True,
        num_speculative_tokens=5,
        counters="counters",
    )


@pytest.mark.parametrize(
    ("method", "draft_logits"),
    [
        *((name, True) for name in ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark")),
        ("ngram", False),
        ("suffix", False),
    ],
)
def test_drafters_with_and_without_logits_are_told_apart(method: str, draft_logits: bool) -> None:
    assert settled(method=method).draft_logits is draft_logits


def test_who_looks_at_draft_logits() -> None:
    found = {name for name in policy_names() if policy_class(name).model_construct(policy=name).looks_at_draft}
    assert found == {"learned", "kl", "mixture", "fsd"}
    assert not settled().reads_draft_logits
    assert settled(collect=True).reads_draft_logits
    assert settled(arbiter={"policy": "kl", "max_kl": 1.0}).reads_draft_logits
    assert not settled(method="ngram", collect=True).reads_draft_logits


@pytest.mark.parametrize("method", ["medusa", "mlp_speculator", "custom_class", "ngram_gpu"])
def test_a_drafter_that_vllm_detects_and_we_do_not_know_is_refused(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settled(method=method)
    assert_one_sentence(caught.value, f"speculative_config.draft_method: vLLM detected '{method}'")


def test_a_draft_model_with_another_vocabulary_is_refused_and_other_drafters_are_not_compared() -> None:
    with pytest.raises(ConfigError, match=r"speculative_config\.model: .* 101 tokens, the target of 100"):
        settled(models={"draft_vocab_size": 101})
    for method in ("eagle", "ngram"):
        settled(method=method, models={"draft_vocab_size": 0}, draft=lambda: pytest.fail("loaded"))


DIGITS = build_tokenizer().get_vocab()


def test_a_draft_whose_tokenizer_has_two_digits_swapped_is_refused_with_the_first_of_them(warnings: list[str]) -> None:
    low, high = sorted(("3", "7"), key=DIGITS.__getitem__)
    swapped = Tokenizer({low: DIGITS[high], high: DIGITS[low]})
    with pytest.raises(ConfigError) as caught:
        settled(draft=lambda: swapped)
    assert_one_sentence(
        caught.value,
        f"speculative_config.model: the draft's tokenizer has {high!r} under id {DIGITS[low]}, where the target's has "
        f"{low!r}; use a draft with the target's tokenizer",
    )
    assert not warnings


def test_strict_verification_takes_any_draft_of_the_right_size() -> None:
    settled(Strict(), draft=lambda: pytest.fail("loaded"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"<|tool|>": 100}, "has '<|tool|>' under id 100, where the target's has nothing"),
        ({"<eos>": 100}, "has '<eos>' under id 100, where the target's has nothing"),
    ],
    ids=["a token the target lacks", "a special token elsewhere"],
)
def test_a_draft_with_tokens_the_target_does_not_have_is_refused(changes: Any, sentence: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        settled(draft=lambda: Tokenizer(changes))


def test_a_draft_that_lacks_a_token_is_warned_of(warnings: list[str]) -> None:
    settled(draft=lambda: Tokenizer({"7": None}))
    assert warnings == [
        f"speculative_config.model: the draft's tokenizer lacks '7' (id {DIGITS['7']}) of the target's; it cannot "
        f"draft that token, and what it drafts after it is a guess."
    ]


def test_padding_of_the_vocabulary_is_no_difference(warnings: list[str]) -> None:
    padded = {"<|reserved_special_token_2|>": 100, "[PAD101]": 101, "<unused3>": 102, "<|finetune_right_pad_id|>": 103}
    settled(draft=lambda: Tokenizer(padded))
    settled(target=lambda: Tokenizer(padded))
    settled(target=lambda: Tokenizer({"<unused7>": 100}), draft=lambda: Tokenizer({"[PAD100]": 100}))
    assert not warnings


def test_the_same_tokens_split_otherwise_are_warned_of(warnings: list[str]) -> None:
    settled(draft=lambda: Tokenizer(split=[1, 2, 3]))
    assert len(warnings) == 1
    assert "splits text otherwise" in warnings[0]


@pytest.mark.parametrize("missing", ["target", "draft"])
def test_a_pair_that_cannot_be_compared_is_warned_of(warnings: list[str], missing: str) -> None:
    def none() -> Any:
        raise ValueError("no\ntokenizer here")

    settled(target=none if missing == "target" else None, draft=none if missing == "draft" else None)
    assert len(warnings) == 1
    assert "was not checked, since a tokenizer is missing (no tokenizer here)" in warnings[0]


def test_a_trained_arbiter_without_a_tokenizer_to_check_is_one_sentence(pair: Pair) -> None:
    def none() -> Any:
        raise ValueError("no\ntokenizer here")

    with pytest.raises(ConfigError) as caught:
        settled(learned(pair.artefact), method="eagle", target=none)
    assert_one_sentence(caught.value, "tokenizer: the target's cannot be loaded (no tokenizer here)")


@pytest.mark.parametrize(("draft", "warned"), [(63, True), (64, False), (128, False)])
@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_a_draft_with_a_shorter_context_is_warned_of(warnings: list[str], method: str, draft: Any, warned: Any) -> None:
    settled(method=method, models={"draft_context": draft})
    assert len(warnings) == warned
    if warned:
        assert "the draft's context of 63 tokens is shorter than the target's of 64" in warnings[0]
        assert "--max-model-len 63" in warnings[0]


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_kl_needs_draft_logits(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"speculative_config\.arbiter: .*'kl' needs draft logits.*'{method}'"):
        settled(Kl(max_kl=1), method=method)
    assert settled(Kl(max_kl=1)).policy == Kl(max_kl=1)


@pytest.mark.parametrize(("tokens", "window"), [(2, 1), (3, 2), (5, 4), (7, 6), (8, 6), (16, 6)])
def test_the_window_of_fly_is_at_most_six_and_fits_the_block(tokens: int, window: int) -> None:
    assert settled(Fly(entropy_top_k=4), tokens=tokens).policy == Fly(entropy_top_k=4, window=window)


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
        ({"threshold": 1.0}, 1.0),
        ({"max_accuracy_loss": 0.2}, 0.3),  # all points pass: the longest acceptance length
        ({"max_accuracy_loss": 0.1}, 0.6),  # the bound of the last point, 0.12, is too large
        ({"max_accuracy_loss": 0.02}, 0.8),
        ({"max_accuracy_loss": 0.001}, 1.0),  # nothing but strict passes
    ],
)
def test_the_threshold_of_a_trained_arbiter(pair: Pair, knobs: dict[str, Any], threshold: float) -> None:
    settings = settled(learned(pair.artefact), served=conditions(pair.draft), **knobs)
    assert settings.threshold == threshold
    assert settings.calibrated.differences == ()
    assert ("LOSSY" in settings.announcement()) == (threshold < 1)
    assert ("output is exactly that of the target" in settings.announcement()) == (threshold == 1)
    assert settings.calibrated.refuse == ("max_accuracy_loss" in knobs and threshold < 1)
    assert settings.lossy == (threshold < 1)
    assert settings.least_threshold == threshold  # the artefact's is the server's too
    assert settled(learned(pair.artefact), served=conditions(pair.draft), collect=True, **knobs).least_threshold == 0


def test_what_was_calibrated_for_something_else_is_announced_or_refused(pair: Pair) -> None:
    other = conditions(pair.draft, dtype="bfloat16", num_speculative_tokens=4)
    settings = settled(learned(pair.artefact), served=other)
    clauses = settings.calibrated.differences
    assert len(clauses) == 2
    assert all(clause in settings.announcement() for clause in clauses)
    refusing: tuple[dict[str, Any], ...] = (
        {"on_mismatch": "refuse"},
        {"max_accuracy_loss": 0.5},
        {"max_accuracy_loss": 0.5, "on_mismatch": "warn"},
    )
    for knobs in refusing:
        with pytest.raises(ConfigError) as caught:
            settled(learned(pair.artefact), served=other, **knobs)
        assert_one_sentence(caught.value, "max_accuracy_loss" if "max_accuracy_loss" in knobs else "on_mismatch")
        assert "bfloat16 instead of float32" in str(caught.value)
    assert settled(learned(pair.artefact), served=conditions(pair.draft), on_mismatch="refuse").calibrated.refuse


def test_an_arbiter_that_does_not_say_what_it_was_calibrated_for_is_served_unless_that_is_to_be_refused(
    tmp_path: Path,
) -> None:
    unknown = learned(write_artefact(tmp_path / "arbiter"))
    settings = settled(unknown)
    assert settings.calibrated == Calibrated()
    with pytest.raises(ConfigError, match=r"on_mismatch: .*does not say"):
        settled(unknown, on_mismatch="refuse")


def test_a_loss_that_was_never_bounded_is_refused(tmp_path: Path) -> None:
    unbounded = tuple(point.model_copy(update={"loss_bound": None}) for point in CURVE)
    for curve in ((), unbounded):
        with pytest.raises(ArtefactError) as caught:
            settled(learned(write_artefact(tmp_path / str(len(curve)), calibration=curve)), max_accuracy_loss=0.5)
        assert_one_sentence(caught.value, "max_accuracy_loss")


def test_an_arbiter_that_does_not_fit_drafter_vocabulary_or_tokenizer_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="with draft logits"):
        settled(learned(pair.artefact), method="ngram")
    with pytest.raises(ArtefactError, match="without draft logits"):
        settled(learned(write_artefact(tmp_path / "a", draft_logits=False)))
    other = Tokenizer({"7": DIGITS["3"], "3": DIGITS["7"]})
    with pytest.raises(ArtefactError, match="tokenizer"):
        settled(learned(pair.artefact), target=lambda: other, draft=lambda: other)
    settled(learned(pair.artefact), models={"target_vocab_size": 128, "draft_vocab_size": 128})  # padded
    settled(learned(write_artefact(tmp_path / "b", draft_logits=False)), method="ngram")


def test_rules_without_a_draft_model_do_not_load_the_tokenizer() -> None:
    settled(Typical(), method="ngram", target=lambda: pytest.fail("loaded"))


def test_lossy_verification_is_announced_with_policy_threshold_and_artefact(pair: Pair) -> None:
    line = settled(learned(pair.artefact), threshold=0.125, served=conditions(pair.draft)).announcement()
    assert "LOSSY" in line
    assert "learned" in line
    assert "0.125" in line
    assert str(pair.artefact) in line
    line = settled(Cascade(alpha=0.375)).announcement()
    assert "LOSSY" in line
    assert "cascade" in line
    assert "0.375" in line
    assert "within a regret of 2.5 nats per response" in settled(Typical(), max_regret=2.5).announcement()
    assert not settled(Typical(), max_regret=0.0).lossy
    assert "max_regret 0, output is exactly that of the target" in settled(Typical(), max_regret=0.0).announcement()
    assert not settled(Strict()).lossy
    assert "LOSSY" not in settled(Strict()).announcement()


def test_the_tokens_between_which_a_model_thinks_are_given_or_its_reasoning_parsers() -> None:
    digit = build_tokenizer().get_vocab()

    class Parser:
        reasoning_start_str, reasoning_end_str = "=", ";"

        def __init__(self, tokenizer: Any) -> None:
            assert tokenizer.get_vocab() == digit

    class Several(Parser):
        reasoning_end_str = "==;"

    class Other(Parser):
        def __init__(self, tokenizer: Any) -> None:
            raise RuntimeError("could not locate think start/end tokens")

    parsers: dict[str, Any] = {"one": Parser, "several": Several, "other": Other}
    ReasoningParserManager.reasoning_parsers.update(parsers)
    try:
        named = {"reasoning_parser": "one"}
        assert settled(models=named).thinking_tokens == (digit["="], digit[";"])
        assert settled(models=named, scope="answer").scope == "answer"
        assert settled(models=named, scope="answer", thinking_tokens=[3, 4]).thinking_tokens == (3, 4)
        assert settled(models=named, request_settings=[]).thinking_tokens is None  # nobody asks
        assert settled().thinking_tokens is None
        for models in ({}, {"reasoning_parser": "several"}):
            with pytest.raises(ConfigError, match=r"\.scope: 'thinking' needs the tokens .*thinking_tokens") as caught:
                settled(models=models, scope="thinking")
            assert_one_sentence(caught.value, "scope")
            assert settled(models=models).thinking_tokens is None  # requests that ask are refused
        with pytest.raises(ConfigError, match=r"reasoning_parser: 'other' .*could not locate.*thinking_tokens"):
            settled(models={"reasoning_parser": "other"}, scope="thinking")
        assert settled(models={"reasoning_parser": "other"}).thinking_tokens is None
        with pytest.raises(ConfigError, match=r"thinking_tokens: 100 is no token of the target's 100"):
            settled(scope="thinking", thinking_tokens=[3, 100])
    finally:
        for name in parsers:
            del ReasoningParserManager.reasoning_parsers[name]


def test_requests_are_watched_at_the_settings_calibration_saw_them_with() -> None:
    directory = Path(vllm_cospec.demo.__file__).parent / "arbiter"
    arbiter = learned(directory)
    _, artefact = load_artefact(directory)
    assert artefact.statement is not None
    own = settled(arbiter, tokens=7, on_drift="strict", drift_pause=500)
    assert (own.traffic, own.on_drift, own.drift_pause) == (artefact.statement.traffic, "strict", 500)
    assert own.traffic is not None
    assert own.traffic.requests == 1000
    for knobs in ({"threshold": 0.9}, {"max_overrides": 3}, {"max_regret": 2.0}, {"exact_tokens": 1}):
        changed: dict[str, Any] = dict(knobs)
        assert settled(arbiter, tokens=7, **changed).traffic is None
        with pytest.raises(ConfigError) as caught:
            settled(arbiter, tokens=7, on_drift="strict", **changed)
        assert_one_sentence(caught.value, "on_drift")
