"""``--speculative-config '{"method": "cospec", ...}'``: what is made of it, and that whatever is wrong with it ends in
one sentence, raised by vLLM's own ``create_engine_config`` before any engine process exists."""

import copy
import dataclasses
import fnmatch
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.transformers_utils import repo_utils
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_cospec import compat, plugin
from vllm_cospec.arbiter import (
    Arbiter,
    ArtefactConfig,
    CurvePoint,
    Provenance,
    current_schema,
    save_artefact,
    tokenizer_hash,
)
from vllm_cospec.config import MAX_RECIPE_BYTES, OWN_KEYS, CoSpecConfig, Settings, resolve, settle
from vllm_cospec.errors import ArtefactError, CompatibilityError, ConfigError, CoSpecError
from vllm_cospec.metrics import DIRECTORY_VARIABLE
from vllm_cospec.policies import Cascade, Fly, Kl, Learned, Random, Strict, Typical, policy_class, policy_names
from vllm_cospec.training.demo_pair import RECIPES, build_model, build_tokenizer

NAN, INF = float("nan"), float("inf")
LEFT_OUT = object()
ENGINE_KEYS = frozenset({"model", "num_speculative_tokens", "draft_tensor_parallel_size", "max_model_len"})
PARAMETERS = {name: {} for name in policy_names()} | {
    "cascade": {"alpha": 0.1},
    "kl": {"max_kl": 1.0},
    "random": {"rate": 0.2},
}
CURVE = tuple(
    CurvePoint(
        threshold=threshold,
        accuracy=0.5,
        accuracy_difference=difference,
        accuracy_difference_ci95=(difference - 0.02, difference + 0.02),
        acceptance_length=length,
        override_rate=0.5,
        num_problems=100,
    )
    for threshold, difference, length in ((0.3, -0.10, 4.0), (0.6, -0.01, 3.0), (0.8, 0.01, 2.5))
)

plugin.register()


@dataclasses.dataclass(frozen=True)
class Pair:
    """Directories of a target, a draft that fits it, a draft with another vocabulary and an arbiter that fits."""

    target: Path
    draft: Path
    other_draft: Path
    artefact: Path


def write_model(directory, extra_tokens=0):
    tokenizer = build_tokenizer()
    shape = dataclasses.replace(RECIPES["draft"], hidden_size=16, intermediate_size=32, num_layers=1, num_heads=1)
    build_model(shape, len(tokenizer) + extra_tokens).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_artefact(directory, *, draft_logits=True, calibration=CURVE, **provenance):
    vocabulary = build_tokenizer().get_vocab()
    provenance = {"vocab_size": len(vocabulary), "tokenizer_hash": tokenizer_hash(vocabulary)} | provenance
    config = ArtefactConfig(
        schema=current_schema(draft_logits),
        hidden_sizes=(8,),
        threshold=0.7,
        calibration=calibration,
        provenance=Provenance(**provenance),
    )
    save_artefact(directory, Arbiter((8,)), config, "# An arbiter for tests\n")
    return directory


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return Pair(
        write_model(root / "target"),
        write_model(root / "draft"),
        write_model(root / "other", extra_tokens=8),
        write_artefact(root / "arbiter"),
    )


@pytest.fixture(autouse=True)
def _offline_and_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(repo_utils, "time", SimpleNamespace(sleep=lambda seconds: None))  # vLLM retries bad files
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")  # recorded by monkeypatch, so it is taken back
    monkeypatch.delenv(DIRECTORY_VARIABLE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def user_config(pair, changes=None, **more):
    """Return a configuration that works, with changes; LEFT_OUT leaves a key out."""
    config = {
        "method": "cospec",
        "model": str(pair.draft),
        "num_speculative_tokens": 3,
        "arbiter": {"policy": "typical"},
    }
    config |= (changes or {}) | more
    return {key: value for key, value in config.items() if value is not LEFT_OUT}


def engine_args(target, speculative_config, **engine):
    engine = {"max_model_len": 64, "enforce_eager": True} | engine
    return EngineArgs(model=str(target), speculative_config=speculative_config, **engine)


def build(target, speculative_config, **engine):
    """Take the way of ``LLM(...)`` and ``vllm serve`` up to the point where an engine would be started."""
    return engine_args(target, speculative_config, **engine).create_engine_config()


def settings_of(pair, **changes):
    return build(pair.target, user_config(pair, **changes)).speculative_config.cospec


def without_counters(settings):
    return dataclasses.replace(settings, counters="")


def assert_one_sentence(error, *names):
    """The error is for a user: one line, not long, nothing of vLLM's or pydantic's, and it names one of ``names``."""
    message = str(error)
    assert message.isprintable(), f"not one line: {message!r}"
    assert len(message) < 600
    for inside in ("Traceback", "validation error", "pydantic", "ArgsKwargs", "object has no attribute"):
        assert inside not in message
    assert any(name in message for name in names), f"{message!r} names none of {names}"
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


def refused(target, speculative_config, *names, **engine):
    before = list(speculative_config.items())
    with pytest.raises(CoSpecError) as caught:
        build(target, speculative_config, **engine)
    assert_one_sentence(caught.value, *names)
    after = list(speculative_config.items())
    assert len(after) == len(before)
    assert all(a is c and b is d for (a, b), (c, d) in zip(before, after, strict=True))
    return caught.value


# --- resolve: the user's keys, the recipe, vLLM's keys ------------------------------------------------------------


def resolved(target="target", **raw):
    raw = {"method": "cospec", "model": "org/draft", "num_speculative_tokens": 3} | raw
    return resolve({k: v for k, v in raw.items() if v is not LEFT_OUT}, str(target), ENGINE_KEYS)


def write_recipe(directory, content):
    directory.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "cospec.json").write_bytes(text)
    return directory


def test_what_is_left_out_has_the_documented_default():
    config, inner = resolved(arbiter={"policy": "typical"})
    assert config == CoSpecConfig(
        arbiter=Typical(),
        draft_method=None,
        threshold=None,
        max_accuracy_loss=None,
        max_overrides=None,
        exact_tokens=0,
        collect=False,
    )
    assert inner == {"model": "org/draft", "num_speculative_tokens": 3}


def test_every_field_of_ours_is_documented_and_none_is_passed_on_to_vllm(pair):
    fields = CoSpecConfig.model_fields
    assert set(fields) == OWN_KEYS == {
        "arbiter", "draft_method", "threshold", "max_accuracy_loss", "max_overrides", "exact_tokens", "collect",
    }  # fmt: skip
    assert all(field.description for field in fields.values())
    config, inner = resolved(
        arbiter=str(pair.artefact),
        draft_method="draft_model",
        threshold=0.25,
        max_overrides=4,
        exact_tokens=8,
        collect=True,
    )
    assert config == CoSpecConfig(
        arbiter=Learned(artefact=str(pair.artefact)),
        draft_method="draft_model",
        threshold=0.25,
        max_overrides=4,
        exact_tokens=8,
        collect=True,
    )
    assert not inner.keys() & OWN_KEYS


def test_all_other_keys_go_to_vllm_untouched():
    _, inner = resolved(arbiter={"policy": "strict"}, draft_tensor_parallel_size=2, max_model_len=99)
    assert inner == {
        "model": "org/draft",
        "num_speculative_tokens": 3,
        "draft_tensor_parallel_size": 2,
        "max_model_len": 99,
    }


def test_the_inner_method_is_the_draft_method_and_never_cospec():
    _, inner = resolved(arbiter={"policy": "strict"}, draft_method="eagle3")
    assert inner["method"] == "eagle3"
    assert "method" not in resolved(arbiter={"policy": "strict"})[1]


def test_dashes_are_as_good_as_underscores(pair):
    config, inner = resolve(
        {"method": "cospec", "model": "org/draft", "num-speculative-tokens": 3, "max-overrides": 2,
         "arbiter": {"policy": "typical"}},
        "target",
        ENGINE_KEYS,
    )  # fmt: skip
    assert config.max_overrides == 2
    assert inner["num_speculative_tokens"] == 3


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_chosen_by_its_name(pair, name):
    parameters = {"artefact": str(pair.artefact)} if name == "learned" else PARAMETERS[name]
    config, _ = resolved(arbiter={"policy": name, **parameters})
    assert config.arbiter == policy_class(name)(**parameters)


def test_a_string_is_the_directory_of_a_trained_arbiter(pair, monkeypatch):
    expected = Learned(artefact=str(pair.artefact))
    assert resolved(arbiter=str(pair.artefact))[0].arbiter == expected
    assert resolved(arbiter={"policy": "learned", "artefact": str(pair.artefact)})[0].arbiter == expected
    monkeypatch.chdir(pair.artefact.parent)
    assert resolved(arbiter="arbiter")[0].arbiter == expected
    assert resolved(arbiter="./arbiter")[0].arbiter == expected
    monkeypatch.setenv("HOME", str(pair.artefact.parent))
    assert resolved(arbiter="~/arbiter")[0].arbiter == expected


def test_a_hub_id_is_fetched_without_anything_that_is_not_an_artefact(pair, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns=None, **_):
        asked.append((repo, allow_patterns))
        return str(pair.artefact)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolved(arbiter="org/arbiter")[0].arbiter == Learned(artefact=str(pair.artefact))
    assert asked == [("org/arbiter", ["config.json", "model.safetensors", "README.md"])]


def test_ngram_needs_no_model():
    config, inner = resolved(arbiter={"policy": "typical"}, draft_method="ngram", model=LEFT_OUT)
    assert config.draft_method == "ngram"
    assert inner == {"method": "ngram", "num_speculative_tokens": 3}


def test_a_recipe_beside_the_target_says_everything(pair, tmp_path):
    target = write_recipe(
        tmp_path / "target",
        {
            "model": str(pair.draft),
            "num_speculative_tokens": 4,
            "arbiter": str(pair.artefact),
            "draft_method": "draft_model",
            "threshold": 0.4,
            "max_overrides": 9,
            "exact_tokens": 5,
            "collect": True,
            "max_model_len": 32,
        },
    )
    config, inner = resolve({"method": "cospec"}, str(target), ENGINE_KEYS)
    assert config == CoSpecConfig(
        arbiter=Learned(artefact=str(pair.artefact)),
        draft_method="draft_model",
        threshold=0.4,
        max_overrides=9,
        exact_tokens=5,
        collect=True,
    )
    assert inner == {
        "method": "draft_model",
        "model": str(pair.draft),
        "num_speculative_tokens": 4,
        "max_model_len": 32,
    }


def test_explicit_keys_win_over_the_recipe_and_the_rest_stays(pair, tmp_path):
    target = write_recipe(
        tmp_path / "target",
        {
            "model": str(pair.other_draft),
            "num_speculative_tokens": 4,
            "arbiter": {"policy": "cascade", "alpha": 0.5},
            "max_overrides": 9,
            "exact_tokens": 5,
        },
    )
    raw = {"method": "cospec", "model": str(pair.draft), "arbiter": {"policy": "typical"}, "exact_tokens": 0}
    config, inner = resolve(raw, str(target), ENGINE_KEYS)
    assert config == CoSpecConfig(arbiter=Typical(), max_overrides=9, exact_tokens=0)
    assert inner == {"model": str(pair.draft), "num_speculative_tokens": 4}


def test_an_arbiter_replaces_the_recipes_whole_and_does_not_inherit_its_parameters(tmp_path):
    target = write_recipe(
        tmp_path / "target",
        {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": {"policy": "typical", "posterior_alpha": 0.9}},
    )
    config, _ = resolve({"method": "cospec", "arbiter": {"policy": "typical"}}, str(target), ENGINE_KEYS)
    assert config.arbiter == Typical()


@pytest.mark.parametrize("style", ["../{0}", "./../{0}", "{0}"])
@pytest.mark.parametrize("as_object", [False, True])
def test_paths_of_a_recipe_are_relative_to_it(pair, tmp_path, style, as_object):
    root = tmp_path / "models"
    beside = root / "target" if style == "{0}" else root
    shutil.copytree(pair.draft, beside / "draft")
    shutil.copytree(pair.artefact, beside / "arbiter")
    arbiter = style.format("arbiter")
    target = write_recipe(
        root / "target",
        {
            "model": style.format("draft"),
            "num_speculative_tokens": 3,
            "arbiter": {"policy": "learned", "artefact": arbiter} if as_object else arbiter,
        },
    )
    config, inner = resolve({"method": "cospec"}, str(target), ENGINE_KEYS)
    assert inner["model"] == str(beside / "draft")
    assert config.arbiter == Learned(artefact=str(beside / "arbiter"))


def test_a_recipe_of_a_target_given_by_a_relative_path_is_found(pair, tmp_path, monkeypatch):
    shutil.copytree(pair.draft, tmp_path / "draft")
    write_recipe(
        tmp_path / "target", {"model": "../draft", "num_speculative_tokens": 3, "arbiter": {"policy": "strict"}}
    )
    monkeypatch.chdir(tmp_path)
    assert resolve({"method": "cospec"}, "target", ENGINE_KEYS)[1]["model"] == str(tmp_path / "draft")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve({"method": "cospec"}, "../target", ENGINE_KEYS)[1]["model"] == str(tmp_path / "draft")


def test_paths_a_user_writes_are_relative_to_the_working_directory_and_hub_ids_stay(pair, tmp_path, monkeypatch):
    target = write_recipe(
        tmp_path / "target", {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": {"policy": "strict"}}
    )
    assert resolve({"method": "cospec"}, str(target), ENGINE_KEYS)[1]["model"] == "org/draft"
    shutil.copytree(pair.artefact, tmp_path / "here" / "mine")
    config, _ = resolve({"method": "cospec", "arbiter": "./mine"}, str(target), ENGINE_KEYS)
    assert config.arbiter == Learned(artefact=str(tmp_path / "here" / "mine"))


@pytest.mark.parametrize("knob", ["threshold", "max_accuracy_loss"])
@pytest.mark.parametrize("recipes", ["threshold", "max_accuracy_loss"])
def test_an_explicit_knob_replaces_the_one_of_the_recipe(pair, tmp_path, knob, recipes):
    content = {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": str(pair.artefact), recipes: 0.4}
    target = write_recipe(tmp_path / "target", content)
    config, _ = resolve({"method": "cospec", knob: 0.2}, str(target), ENGINE_KEYS)
    expected = {"threshold": None, "max_accuracy_loss": None} | {knob: 0.2}
    assert {name: getattr(config, name) for name in expected} == expected
    unchanged, _ = resolve({"method": "cospec", "exact_tokens": 1}, str(target), ENGINE_KEYS)
    assert getattr(unchanged, recipes) == 0.4


@pytest.mark.parametrize("recipes", ["threshold", "max_accuracy_loss"])
@pytest.mark.parametrize("rule", [True, False])
def test_the_recipes_knob_goes_with_the_recipes_arbiter(pair, tmp_path, recipes, rule):
    content = {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": str(pair.artefact), recipes: 0.4}
    target = write_recipe(tmp_path / "target", content)
    arbiter = {"policy": "typical"} if rule else str(write_artefact(tmp_path / "mine"))
    config, _ = resolve({"method": "cospec", "arbiter": arbiter}, str(target), ENGINE_KEYS)
    assert (config.threshold, config.max_accuracy_loss) == (None, None)


def test_neither_the_users_dict_nor_what_is_in_it_is_changed(tmp_path):
    target = write_recipe(tmp_path / "target", {"model": "org/draft", "exact_tokens": 3})
    raw = {"method": "cospec", "num-speculative-tokens": 3, "arbiter": {"policy": "typical"}, "draft_method": "eagle"}
    before = copy.deepcopy(raw)
    resolve(raw, str(target), ENGINE_KEYS)
    assert raw == before


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository, org/target, in this directory; only what is asked for is downloaded."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()

    def fetch(path):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / path, cache / path)

    def hf_hub_download(repo, filename, **_):
        if repo != "org/target" or not (remote / filename).is_file():
            raise OSError(f"{repo} has no {filename}")
        fetch(filename)
        return str(cache / filename)

    def snapshot_download(repo, allow_patterns=None, **_):
        if repo != "org/target":
            raise OSError(f"no repository {repo}")
        patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
        for path in remote.rglob("*"):
            name = path.relative_to(remote).as_posix()
            if path.is_file() and (patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)):
                fetch(name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote


def test_the_recipe_of_a_repository_is_used(hub):
    write_recipe(hub, {"model": "org/draft", "num_speculative_tokens": 6, "arbiter": {"policy": "typical"}})
    config, inner = resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)
    assert config.arbiter == Typical()
    assert inner == {"model": "org/draft", "num_speculative_tokens": 6}


@pytest.mark.parametrize("arbiter", ["arbiter", "./arbiter"])
def test_an_arbiter_inside_the_repository_of_the_recipe_is_found(hub, arbiter):
    write_artefact(hub / "arbiter")
    write_recipe(hub, {"model": "org/draft", "num_speculative_tokens": 6, "arbiter": arbiter})
    config, _ = resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)
    assert Path(config.arbiter.artefact, "model.safetensors").is_file()


@pytest.mark.parametrize("path", ["../../arbiter", "arbiter/../../../x", "/etc", "./../x"])
@pytest.mark.parametrize("key", ["model", "arbiter", "artefact"])
def test_the_recipe_of_a_repository_cannot_point_out_of_it(hub, key, path):
    content = {"model": "org/draft", "num_speculative_tokens": 6, "arbiter": {"policy": "typical"}}
    content |= {"arbiter": {"policy": "learned", "artefact": path}} if key == "artefact" else {key: path}
    write_recipe(hub, content)
    with pytest.raises(ConfigError, match="leaves the repository"):
        resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)


def test_a_repository_without_a_recipe_asks_for_the_keys(hub):
    with pytest.raises(ConfigError, match=r"speculative_config\.arbiter: missing"):
        resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)


# --- settle: what fits what ---------------------------------------------------------------------------------------


def settled(arbiter=None, *, method="draft_model", tokens=5, target_vocab=100, draft_vocab=100, vocabulary=None, **own):
    return settle(
        CoSpecConfig(arbiter=arbiter or Typical(), **own),
        method,
        tokens,
        target_vocab,
        draft_vocab,
        vocabulary or build_tokenizer().get_vocab,
        "counters",
    )


def learned(path):
    return Learned(artefact=str(path))


def test_settings_carry_every_field():
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
def test_drafters_with_and_without_logits_are_told_apart(method, draft_logits):
    assert settled(method=method).draft_logits is draft_logits


@pytest.mark.parametrize("method", ["medusa", "mlp_speculator", "dflash", "dspark", "custom_class", "ngram_gpu"])
def test_a_drafter_that_vllm_detects_and_we_do_not_know_is_refused(method):
    with pytest.raises(ConfigError) as caught:
        settled(method=method)
    assert_one_sentence(caught.value, f"speculative_config.draft_method: vLLM detected '{method}'")


def test_a_draft_model_with_another_vocabulary_is_refused_and_other_drafters_are_not_compared():
    with pytest.raises(ConfigError, match=r"speculative_config\.model: .* 101 tokens, the target of 100"):
        settled(draft_vocab=101)
    for method in ("eagle", "ngram"):
        settled(method=method, draft_vocab=0)


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_kl_needs_draft_logits(method):
    with pytest.raises(ConfigError, match=rf"speculative_config\.arbiter: .*'kl' needs draft logits.*'{method}'"):
        settled(Kl(max_kl=1), method=method)
    assert settled(Kl(max_kl=1)).policy == Kl(max_kl=1)


@pytest.mark.parametrize(("tokens", "window"), [(2, 1), (3, 2), (5, 4), (7, 6), (8, 6), (16, 6)])
def test_the_window_of_fly_is_at_most_six_and_fits_the_block(tokens, window):
    assert settled(Fly(entropy_top_k=5), tokens=tokens).policy == Fly(entropy_top_k=5, window=window)


def test_an_explicit_window_of_fly_stays():
    assert settled(Fly(window=2), tokens=8).policy.window == 2
    assert settled(Fly(window=7), tokens=8).policy.window == 7


@pytest.mark.parametrize(("window", "tokens"), [(None, 1), (1, 1), (5, 5), (127, 5)])
def test_a_window_of_fly_that_no_block_can_fill_is_refused(window, tokens):
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
def test_the_threshold_of_a_trained_arbiter(pair, knobs, threshold):
    assert settled(learned(pair.artefact), **knobs).threshold == threshold


def test_a_loss_that_no_threshold_keeps_is_refused(pair, tmp_path):
    with pytest.raises(ArtefactError) as caught:
        settled(learned(pair.artefact), max_accuracy_loss=0.001)
    assert_one_sentence(caught.value, "max_accuracy_loss")
    with pytest.raises(ArtefactError) as caught:
        settled(learned(write_artefact(tmp_path / "plain", calibration=())), max_accuracy_loss=0.5)
    assert_one_sentence(caught.value, "max_accuracy_loss")


def test_an_arbiter_that_does_not_fit_drafter_vocabulary_or_tokenizer_is_refused(pair, tmp_path):
    with pytest.raises(ArtefactError, match="with draft logits"):
        settled(learned(pair.artefact), method="ngram")
    with pytest.raises(ArtefactError, match="without draft logits"):
        settled(learned(write_artefact(tmp_path / "a", draft_logits=False)))
    with pytest.raises(ArtefactError, match="vocabulary of 100 tokens, the target has 101"):
        settled(learned(pair.artefact), target_vocab=101, draft_vocab=101)
    with pytest.raises(ArtefactError, match="tokenizer"):
        settled(learned(pair.artefact), vocabulary=lambda: {"a": 0, "b": 1})
    settled(learned(write_artefact(tmp_path / "b", draft_logits=False)), method="ngram")


def test_rules_do_not_load_the_tokenizer():
    settled(Typical(), vocabulary=lambda: pytest.fail("loaded"))


def test_lossy_verification_is_announced_with_policy_threshold_and_artefact(pair):
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


# --- through vLLM -------------------------------------------------------------------------------------------------


def test_vllm_gets_the_inner_method_our_worker_and_the_settings(pair):
    config = build(pair.target, user_config(pair, draft_tensor_parallel_size=1, max_model_len=48))
    speculative = config.speculative_config
    assert speculative.method == "draft_model"
    assert speculative.num_speculative_tokens == 3
    assert speculative.draft_model_config.model == str(pair.draft)
    assert speculative.draft_model_config.max_model_len == 48
    assert speculative.draft_sample_method == "probabilistic"
    assert config.parallel_config.worker_cls == "vllm_cospec.workers.cpu.CoSpecCPUWorker"
    assert without_counters(speculative.cospec) == Settings(
        policy=Typical(),
        threshold=0.5,
        max_overrides=None,
        exact_tokens=0,
        collect=False,
        draft_logits=True,
        num_speculative_tokens=3,
        counters="",
    )
    assert Path(speculative.cospec.counters).is_dir()


def test_ngram_drafts_without_a_model(pair):
    config = build(pair.target, user_config(pair, draft_method="ngram", model=LEFT_OUT, prompt_lookup_max=4))
    assert config.speculative_config.method == "ngram"
    assert config.speculative_config.prompt_lookup_max == 4
    assert not config.speculative_config.cospec.draft_logits


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_gets_through_vllm(pair, name):
    parameters = {"artefact": str(pair.artefact)} if name == "learned" else PARAMETERS[name]
    settings = settings_of(pair, arbiter={"policy": name, **parameters})
    expected = policy_class(name)(**parameters)
    assert settings.policy == (Fly(window=2) if name == "fly" else expected)


def test_an_explicit_way_of_drafting_stays(pair):
    config = build(pair.target, user_config(pair, draft_sample_method="greedy"))
    assert config.speculative_config.draft_sample_method == "greedy"


def test_a_trained_arbiter_is_checked_against_the_real_tokenizer(pair):
    settings = settings_of(pair, arbiter=str(pair.artefact), max_accuracy_loss=0.1)
    assert settings.policy == learned(pair.artefact)
    assert settings.threshold == 0.6


def test_the_method_alone_is_enough_beside_a_recipe(pair, tmp_path):
    shutil.copytree(pair.target, tmp_path / "target")
    write_recipe(
        tmp_path / "target", {"model": str(pair.draft), "num_speculative_tokens": 4, "arbiter": str(pair.artefact)}
    )
    settings = build(tmp_path / "target", {"method": "cospec"}).speculative_config.cospec
    assert (settings.policy, settings.num_speculative_tokens) == (learned(pair.artefact), 4)


def test_vllms_short_flags_mean_the_same(pair):
    args = engine_args(
        pair.target,
        {"arbiter": {"policy": "random", "rate": 0.5}},
        spec_method="cospec",
        spec_model=str(pair.draft),
        spec_tokens=4,
    )
    settings = args.create_engine_config().speculative_config.cospec
    assert (settings.policy, settings.num_speculative_tokens) == (Random(rate=0.5), 4)
    assert (args.spec_method, args.spec_model, args.spec_tokens) == ("cospec", str(pair.draft), 4)


def test_the_users_arguments_are_not_changed_and_give_the_same_twice(pair):
    raw = user_config(pair, arbiter={"policy": "typical", "posterior_alpha": 0.4})
    before = copy.deepcopy(raw)
    args = engine_args(pair.target, raw)
    first = args.create_engine_config().speculative_config
    assert raw == before
    assert args.speculative_config == before
    second = args.create_engine_config().speculative_config
    assert raw == before
    third = build(pair.target, raw).speculative_config
    assert without_counters(first.cospec) == without_counters(second.cospec) == without_counters(third.cospec)
    assert first.num_speculative_tokens == second.num_speculative_tokens == third.num_speculative_tokens
    assert first.compute_hash() == second.compute_hash() == third.compute_hash()


def test_a_refusal_changes_the_users_arguments_as_little(pair):
    for changes in ({"exact_tokens": -1}, {"arbiter": {"policy": "fly", "window": 3}}, {"quantization": "made-up"}):
        raw = user_config(pair, changes)
        before = copy.deepcopy(raw)
        args = engine_args(pair.target, raw)
        with pytest.raises(CoSpecError):
            args.create_engine_config()
        assert raw == before
        assert args.speculative_config == before


def test_a_second_engine_is_not_refused_for_the_environment_the_first_one_left(pair):
    for _ in range(2):
        build(pair.target, user_config(pair), fail_on_environ_validation=True)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))])
def test_the_settings_travel_with_vllms_configuration(pair, way):
    config = build(pair.target, user_config(pair, arbiter=str(pair.artefact), threshold=0.25, max_overrides=3))
    expected = config.speculative_config.cospec
    assert way(config.speculative_config).cospec == expected
    assert way(config).speculative_config.cospec == expected


def test_the_settings_leave_vllms_hash_alone(pair):
    stock = build(pair.target, {"model": str(pair.draft), "num_speculative_tokens": 3}).speculative_config
    assert build(pair.target, user_config(pair)).speculative_config.compute_hash() == stock.compute_hash()


def test_lossy_verification_is_warned_of_once(pair):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    plugin.logger.addHandler(handler)
    try:
        for _ in range(2):
            settings_of(pair, arbiter={"policy": "typical", "posterior_threshold": 0.012345})
    finally:
        plugin.logger.removeHandler(handler)
    lines = [record for record in records if "0.012345" in record.getMessage()]
    assert [(line.levelname, "LOSSY" in line.getMessage()) for line in lines] == [("WARNING", True)]


def test_an_untested_version_is_served_when_every_hook_is_there(pair, monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.0")
    assert settings_of(pair).policy == Typical()


def test_a_vllm_that_lost_a_hook_is_refused_before_an_engine_starts(pair, monkeypatch):
    monkeypatch.delattr(RejectionSampler, "apply_logits_processors")
    error = refused(pair.target, user_config(pair), "RejectionSampler.apply_logits_processors")
    assert isinstance(error, CompatibilityError)
    build(pair.target, {"model": str(pair.draft), "num_speculative_tokens": 3})  # without cospec it still serves


STOCK = """
import dataclasses, re, sys
from vllm.engine.arg_utils import EngineArgs
from vllm_cospec import compat, plugin

stock = EngineArgs.create_speculative_config
plugin.register()
ours = EngineArgs.create_speculative_config
assert ours is not stock
target, draft = sys.argv[1:]

def outcome(create, config, **flags):
    EngineArgs.create_speculative_config = create
    args = EngineArgs(model=target, max_model_len=64, enforce_eager=True, speculative_config=config, **flags)
    try:
        built = args.create_engine_config()
        made = built.speculative_config
        assert not hasattr(made, "cospec")
        fields = [] if made is None else [(f.name, repr(getattr(made, f.name))) for f in dataclasses.fields(made)]
        result = (type(made), fields, built.parallel_config.worker_cls, sorted(args.speculative_config or ()))
    except Exception as error:
        result = (type(error), str(error))
    return re.sub("0x[0-9a-f]+", "", repr(result))

cases = [
    lambda: (None, {}),
    lambda: ({"model": draft, "num_speculative_tokens": 3}, {}),
    lambda: ({"model": draft, "num-speculative-tokens": 3, "method": "draft_model"}, {}),
    lambda: ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}, {}),
    lambda: (None, {"spec_method": "ngram", "spec_tokens": 2}),
    lambda: ({"method": "ngram"}, {"spec_method": "ngram"}),
    lambda: ({"model": draft, "num_speculative_tokens": 3, "max_overrides": 1}, {}),
    lambda: ({"method": "cospecc", "model": draft, "num_speculative_tokens": 3}, {}),
    lambda: ({"method": ["cospec"], "model": draft, "num_speculative_tokens": 3}, {}),
    lambda: ({"model": draft, "num_speculative_tokens": 0}, {}),
]
for case in cases:
    (config, flags), (again, _) = case(), case()
    expected, got = outcome(stock, config, **flags), outcome(ours, again, **flags)
    assert got == expected, (got, expected)
for patch in compat.PATCHES:
    assert patch.when == "always" or compat.MARK not in vars(compat.find(patch.symbol)), patch.symbol
print("SAME", len(cases))
"""


def test_without_cospec_everything_is_as_without_the_plugin(pair):
    result = subprocess.run(
        [sys.executable, "-c", STOCK, pair.target, pair.draft],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "VLLM_PLUGINS": ""},  # the script registers by itself, after a look at the original
        check=False,
    )
    assert "SAME 10" in result.stdout, result.stderr[-3000:]


# --- malformed configurations: one sentence each ------------------------------------------------------------------


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def rule(name, **parameters):
    return {"arbiter": {"policy": name, **parameters}}


def wrong(field, values):
    """Return cases of one key with each of these values, named after the value; the message must name the key."""
    return {f"{field} {name}": ({field: value}, f"speculative_config.{field}") for name, value in values.items()}


def wrong_parameter(policy, parameter, values, **others):
    """Return cases of one parameter of a policy with each of these values; the message must name the parameter."""
    return {
        f"{policy} {parameter} {name}": (rule(policy, **others, **{parameter: value}), f"arbiter.{parameter}")
        for name, value in values.items()
    }


NOT_NUMBERS = {"text": "0.5", "true": True, "list": [0.5], "object": {}, "nan": NAN, "inf": INF, "minus inf": -INF}
NOT_INTEGERS = NOT_NUMBERS | {"text": "5", "fraction": 1.5, "whole float": 5.0}
NOT_STRINGS = {"number": 5, "true": True, "list": [], "object": {}}
NOT_IN_INT64 = {"one too many for int64": 2**63, "huge": 10**30}
NGRAM = {"draft_method": "ngram", "model": LEFT_OUT}

OWN_FIELDS = {
    **wrong("threshold", NOT_NUMBERS | {"negative": -0.01, "above one": 1.01, "huge": 10**400, "nested": nested(900)}),
    **wrong("max_accuracy_loss", NOT_NUMBERS | {"zero": 0, "above one": 2}),
    **wrong("max_overrides", NOT_INTEGERS | NOT_IN_INT64 | {"negative": -1}),
    **wrong("exact_tokens", NOT_INTEGERS | NOT_IN_INT64 | {"negative": -1, "null": None}),
    **wrong("collect", {"text": "true", "number": 1, "null": None, "list": [True]}),
    **wrong("draft_method", NOT_STRINGS),
    **wrong("arbiter", NOT_STRINGS | {"empty": "", "list of policies": [{"policy": "typical"}]}),
    **wrong("arbiter", {"null": None, "left out": LEFT_OUT, "nested": nested(900), "nested deeper": nested(20_000)}),
    "both knobs": ({"threshold": 0.5, "max_accuracy_loss": 0.1}, "max_accuracy_loss exclude"),
    "threshold of a rule": ({"threshold": 0.5}, "threshold is for a trained arbiter"),
    "max_accuracy_loss of a rule": ({"max_accuracy_loss": 0.5}, "max_accuracy_loss is for a trained arbiter"),
    "draft_method unknown": ({"draft_method": "eagle4"}, "draft_method 'eagle4' is not supported"),
    "draft_method in capitals": ({"draft_method": "NGRAM"}, "draft_method 'NGRAM' is not supported"),
    "draft_method cospec": ({"draft_method": "cospec"}, "draft_method 'cospec' is not supported"),
    "draft_method of vLLM's that we lack": ({"draft_method": "medusa"}, "draft_method 'medusa' is not supported"),
    "draft_method empty": ({"draft_method": ""}, "draft_method '' is not supported"),
    "draft_method of 5000 characters": ({"draft_method": "x" * 5000}, "draft_method"),
    "draft_method with a line break": ({"draft_method": "ng\nram"}, "draft_method"),
    "mtp of a target without it": ({"draft_method": "mtp", "model": LEFT_OUT}, "mtp"),
    "arbiter a policy's name": ({"arbiter": "typical"}, "speculative_config.arbiter: no directory at 'typical'"),
}

UNKNOWN_KEYS = {
    "near miss of threshold": ({"treshold": 0.5}, "treshold: unknown key (value 0.5); did you mean 'threshold'?"),
    "near miss of max_overrides": ({"max_override": 1}, "did you mean 'max_overrides'?"),
    "near miss with dashes": ({"max-overides": 1}, "did you mean 'max_overrides'?"),
    "near miss of arbiter": ({"arbitor": "x"}, "did you mean 'arbiter'?"),
    "near miss of draft_method": ({"draft_mehtod": "ngram"}, "did you mean 'draft_method'?"),
    "near miss of vLLM's key": ({"num_speculative_token": 3}, "did you mean 'num_speculative_tokens'?"),
    **wrong("xyzzy", {"number": 1, "5000 characters": "x" * 5000, "long list": [1] * 5000, "nested": nested(900)}),
    **wrong("policy", {"beside the arbiter": "typical"}),
    **wrong("cospec_threshold", {"of a request": 0.5}),
    **wrong("target_model_config", {"of vLLM's own making": {}}),
    "empty key": ({"": 1}, "unknown key"),
    "key with a line break": ({"foo\nbar": 1}, "unknown key"),
    "key with an escape sequence": ({"\x1b[31mfoo": 1}, "unknown key"),
    "key of 5000 characters": ({"x" * 5000: 1}, "unknown key"),
    "key that is a number": ({5: 1}, "speculative_config.5"),
    "key that is null": ({None: 1}, "speculative_config.None"),
    "one key in two spellings": ({"max-overrides": 1, "max_overrides": 2}, "max_overrides"),
}

POLICIES = {
    "policy unknown": (rule("typicl"), "speculative_config.arbiter.policy: unknown policy 'typicl'"),
    "policy in capitals": (rule("Typical"), "unknown policy 'Typical'"),
    "policy empty": (rule(""), "unknown policy ''"),
    "policy null": (rule(None), "speculative_config.arbiter.policy"),
    "policy number": (rule(5), "speculative_config.arbiter.policy"),
    "policy list": (rule(["typical"]), "speculative_config.arbiter.policy"),
    "policy object": (rule({"policy": "typical"}), "speculative_config.arbiter.policy"),
    "policy nested": (rule(nested(900)), "speculative_config.arbiter"),
    "policy of 5000 characters": (rule("x" * 5000), "speculative_config.arbiter.policy"),
    "policy with a line break": (rule("typ\nical"), "speculative_config.arbiter.policy"),
    "policy missing": ({"arbiter": {"posterior_alpha": 0.3}}, "speculative_config.arbiter"),
    "policy under another key": ({"arbiter": {"name": "typical"}}, "speculative_config.arbiter"),
    "learned without artefact": (rule("learned"), "speculative_config.arbiter.artefact: missing"),
    "learned with an empty artefact": (rule("learned", artefact=""), "speculative_config.arbiter"),
    "cascade without alpha": (rule("cascade"), "speculative_config.arbiter.alpha: missing"),
    "kl without max_kl": (rule("kl"), "speculative_config.arbiter.max_kl: missing"),
    "kl with ngram": (rule("kl", max_kl=1) | NGRAM, "speculative_config.arbiter: policy 'kl' needs draft logits"),
    "random without rate": (rule("random"), "speculative_config.arbiter.rate: missing"),
    "fly with a block of one": (rule("fly") | {"num_speculative_tokens": 1}, "speculative_config.arbiter.window"),
    "typical with a key of 5000 characters": (rule("typical", **{"x" * 5000: 1}), "speculative_config.arbiter"),
    "typical with a line break in a key": (rule("typical", **{"a\nb": 1}), "speculative_config.arbiter"),
    **wrong_parameter("learned", "artefact", NOT_STRINGS | {"null": None}),
    **wrong_parameter("learned", "threshold", {"inside": 0.5}, artefact="x"),
    **wrong_parameter("cascade", "alpha", NOT_NUMBERS | {"null": None, "above one": 1.5, "negative": -0.1}),
    **wrong_parameter("cascade", "beta", {"unknown": 1}, alpha=0.5),
    **wrong_parameter("kl", "max_kl", NOT_NUMBERS | {"negative": -1}),
    **wrong_parameter("random", "rate", NOT_NUMBERS | {"above one": 1.01}),
    **wrong_parameter("random", "seed", NOT_INTEGERS | {"negative": -1, "too large": 2**31}, rate=0.5),
    **wrong_parameter("typical", "posterior_threshold", NOT_NUMBERS | {"negative": -1}),
    **wrong_parameter("typical", "posterior_alpha", {"inf": INF, "5000 characters": "x" * 5000}),
    **wrong_parameter("typical", "posterior_treshold", {"misspelt": 0.1}),
    **wrong_parameter("relaxed_topk", "top_n", NOT_INTEGERS | {"zero": 0, "too large for a float": 10**400}),
    **wrong_parameter("relaxed_topk", "delta", {"above one": 1.1}),
    **wrong_parameter("threshold", "single", {"zero": 0}),
    **wrong_parameter("threshold", "acc", {"word": "high"}),
    **wrong_parameter("threshold", "threshold", {"unknown": 0.4}),
    **wrong_parameter("mars", "ratio", {"negative": -0.1}),
    **wrong_parameter("strict", "alpha", {"unknown": 1}),
    **wrong_parameter("fly", "window", {"zero": 0, "as long as the block": 3, "too large": 128}),
    **wrong_parameter("fly", "entropy_top_k", {"zero": 0, "too large": 65}),
    **wrong_parameter("fly", "entropy_threshold", {"negative": -1}),
}

ENGINES_KEYS = {
    **wrong("model", NOT_STRINGS | {"null": None, "left out": LEFT_OUT, "nested": nested(900), "long": ["x"] * 9000}),
    **wrong("num_speculative_tokens", {"zero": 0, "negative": -1, "fraction": 1.5, "whole float": 3.0, "text": "5"}),
    **wrong("num_speculative_tokens", {"true": True, "huge": 10**9, "too large": 129, "beyond printing": 10**5000}),
    **wrong("num_speculative_tokens", {"nan": NAN, "list": [3], "object": {"value": 3}, "nested": nested(900)}),
    **wrong("num_speculative_tokens", {"null": None, "left out": LEFT_OUT}),
    **wrong("rejection_sample_method", {"fly": "fly", "synthetic": "synthetic", "number": 5, "long": ["x" * 3000]}),
    **wrong("use_heterogeneous_vocab", {"true": True, "text": "yes"}),
    **wrong("parallel_drafting", {"true": True}),
    "model left out of eagle": ({"model": LEFT_OUT, "draft_method": "eagle"}, "speculative_config.model"),
    # the sentence for these is vLLM's
    **{
        f"draft_tensor_parallel_size {name}": ({"draft_tensor_parallel_size": value}, "draft_tensor_parallel_size")
        for name, value in {"zero": 0, "negative": -1, "text": "two", "fraction": 1.5, "list": [1], "other": 2}.items()
    },
    "enable_adaptive_verification": ({"enable_adaptive_verification": True}, "enable_adaptive_verification"),
    "max_model_len negative": ({"max_model_len": -5}, "max_model_len"),
    "max_model_len text": ({"max_model_len": "long"}, "max_model_len"),
    "max_model_len beyond the model's": ({"max_model_len": 10**9}, "max_model_len"),
    "quantization unknown": ({"quantization": "made-up"}, "quantization"),
    "quantization of 5000 characters": ({"quantization": "x" * 5000}, "quantization"),
    "quantization nested": ({"quantization": nested(900)}, "quantization"),
    "attention_backend unknown": ({"attention_backend": "made-up"}, "attention_backend"),
    "draft_sample_method unknown": ({"draft_sample_method": "best"}, "draft_sample_method"),
    "enforce_eager text": ({"enforce_eager": "perhaps"}, "enforce_eager"),
    "revision number": ({"revision": 5}, "revision"),
    "tensor_parallel_size": ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
    "synthetic_acceptance_length": ({"synthetic_acceptance_length": 2.0}, "synthetic_acceptance_length"),
    "prompt_lookup_max zero": (NGRAM | {"prompt_lookup_max": 0}, "prompt_lookup_max"),
    "prompt_lookup_min too large": (NGRAM | {"prompt_lookup_max": 2, "prompt_lookup_min": 5}, "prompt_lookup_min"),
}

MALFORMED = OWN_FIELDS | UNKNOWN_KEYS | POLICIES | ENGINES_KEYS


@pytest.mark.parametrize(("changes", "names"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_configuration_is_refused_in_one_sentence(pair, changes, names):
    refused(pair.target, user_config(pair, changes), names)


ENGINE_SETTINGS = {
    "worker_cls": ({"worker_cls": "mine.Worker"}, "worker_cls: 'mine.Worker'"),
    "pipeline_parallel_size": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: 2"),
    "spec_method": ({"spec_method": "ngram"}, "--spec-method"),
    "spec_model": ({"spec_model": "org/draft"}, "--spec-model"),
    "spec_tokens": ({"spec_tokens": 3}, "--spec-tokens"),
}


@pytest.mark.parametrize(("engine", "names"), ENGINE_SETTINGS.values(), ids=ENGINE_SETTINGS)
def test_settings_of_the_engine_that_exclude_cospec_are_refused_in_one_sentence(pair, engine, names):
    refused(pair.target, user_config(pair), names, **engine)


def symlink_loop(place):
    (place / "loop").symlink_to(place / "loop")
    return place / "loop"


def empty_directory(place):
    (place / "empty").mkdir()
    return place / "empty"


def file(place):
    (place / "file").write_text("{}")
    return place / "file"


def fifo(place):
    os.mkfifo(place / "fifo")  # opening it would hang
    return place / "fifo"


def directory_of_devices(place):
    (place / "devices").mkdir()
    for name in ("config.json", "model.safetensors"):
        (place / "devices" / name).symlink_to("/dev/zero")  # reading it would never end
    return place / "devices"


def directory_of_directories(place):
    (place / "directories" / "config.json").mkdir(parents=True)
    return place / "directories"


def relative_directory(place):
    (place / "here" / "org" / "empty").mkdir(parents=True)
    return "org/empty"


PATHS = {
    "symlink loop": symlink_loop,
    "empty directory": empty_directory,
    "file": file,
    "fifo": fifo,
    "directory of devices": directory_of_devices,
    "directory of directories": directory_of_directories,
    "relative directory that looks like a hub id": relative_directory,
    "nothing there": lambda place: place / "nothing",
    "below a file": lambda place: file(place) / "below",
    "null byte": lambda place: "a\0b",
    "null byte in an absolute path": lambda place: f"{place}/\0",
    "null byte in a hub id": lambda place: "org/name\0",
    "5000 characters": lambda place: "x" * 5000,
    "5000 characters, absolute": lambda place: "/" + "x" * 5000,
    "5000 directories": lambda place: "../" * 5000,
    "line break": lambda place: place / "a\nb",
    "lone surrogate": lambda place: "/\ud800",
    "null device": lambda place: "/dev/null",
    "zero device": lambda place: "/dev/zero",
    "root": lambda place: "/",
    "up": lambda place: "../../..",
    "here": lambda place: ".",
    "home": lambda place: "~/no-such-directory",
    "home of nobody": lambda place: "~no-such-user/arbiter",
    "url": lambda place: "https://example.invalid/model",
    "bucket": lambda place: "s3://bucket/model",
    "hub id that cannot be fetched": lambda place: "nobody/nothing",
    "malformed hub id": lambda place: "no body/no thing",
    "hub id with a line break": lambda place: "no/bo\ndy",
    "lone surrogate in a hub id": lambda place: "\ud800/x",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_hostile_path_of_the_draft_is_refused_in_one_sentence(pair, tmp_path, path):
    value = str(path(tmp_path))
    refused(pair.target, user_config(pair, model=value), "speculative_config.model", repr(value))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_hostile_path_of_the_arbiter_is_refused_in_one_sentence(pair, tmp_path, path):
    refused(
        pair.target, user_config(pair, arbiter=str(path(tmp_path))), "speculative_config.arbiter", "no arbiter here"
    )


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def poison(tensors):
    tensors["layers.0.weight"][0, 0] = NAN
    return tensors


ARTEFACTS = {
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "weights truncated": (lambda d: os.truncate(d / "model.safetensors", 200), "model.safetensors"),
    "weights empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "weights not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\x80" * 999), "model.safetensors"),
    "weights with nan": (lambda d: edit_weights(d, poison), "layers.0.weight"),
    "weights with swapped shapes": (
        lambda d: edit_weights(d, lambda t: {k: v.t().contiguous() if v.dim() == 2 else v for k, v in t.items()}),
        "layers.0.weight",
    ),
    "weights with a tensor too many": (lambda d: edit_weights(d, lambda t: t | {"more": torch.ones(1)}), "'more'"),
    "weights in half precision": (
        lambda d: edit_weights(d, lambda t: {k: v.half() for k, v in t.items()}),
        "not finite float32",
    ),
    "scale of zero": (lambda d: edit_weights(d, lambda t: t | {"scale": torch.zeros(16)}), "'scale'"),
    "config not json": (lambda d: (d / "config.json").write_text("not json\nat all"), "config.json"),
    "config binary": (lambda d: (d / "config.json").write_bytes(bytes(range(256))), "config.json"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "config nested without end": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json"),
    "config too large": (lambda d: (d / "config.json").write_text(" " * (4 * 2**20 + 1)), "config.json"),
    "config with an unknown key": (lambda d: edit_json(d / "config.json", xyzzy=1), "config.json.xyzzy"),
    "config with a long unknown key": (lambda d: edit_json(d / "config.json", **{"x\n" * 999: 1}), "config.json"),
    "config with a threshold of 2": (lambda d: edit_json(d / "config.json", threshold=2), "config.json.threshold"),
    "config of another network": (lambda d: edit_json(d / "config.json", hidden_sizes=[9]), "model.safetensors"),
    "config of a huge network": (lambda d: edit_json(d / "config.json", hidden_sizes=[10**9]), "hidden_sizes"),
    "config of another format": (lambda d: edit_json(d / "config.json", format_version=2), "format_version"),
    "config of another schema": (
        lambda d: edit_json(d / "config.json", schema=current_schema(True).model_dump() | {"hash": "0" * 16}),
        "schema",
    ),
    "other vocabulary": (lambda d: write_artefact(d, vocab_size=32_000), "vocabulary"),
    "other tokenizer": (lambda d: write_artefact(d, tokenizer_hash="0" * 16), "tokenizer"),
    "other kind of drafter": (lambda d: write_artefact(d, draft_logits=False), "draft logits"),
}


@pytest.mark.parametrize(("damage", "names"), ARTEFACTS.values(), ids=ARTEFACTS)
def test_a_damaged_or_foreign_artefact_is_refused_in_one_sentence(pair, tmp_path, damage, names):
    directory = Path(shutil.copytree(pair.artefact, tmp_path / "arbiter"))
    damage(directory)
    refused(pair.target, user_config(pair, arbiter=str(directory)), names)


def test_an_artefact_trained_with_draft_logits_is_refused_for_ngram(pair):
    refused(
        pair.target,
        user_config(pair, arbiter=str(pair.artefact), draft_method="ngram", model=LEFT_OUT),
        "draft logits",
    )


@pytest.mark.parametrize("calibration", [(), CURVE], ids=["no curve", "no safe point"])
def test_a_loss_the_artefact_cannot_promise_is_refused_in_one_sentence(pair, tmp_path, calibration):
    directory = write_artefact(tmp_path / "arbiter", calibration=calibration)
    refused(pair.target, user_config(pair, arbiter=str(directory), max_accuracy_loss=0.001), "max_accuracy_loss")


DRAFTS = {
    "without config": lambda d: (d / "config.json").unlink(),
    "config truncated": lambda d: os.truncate(d / "config.json", 40),
    "config empty": lambda d: (d / "config.json").write_text(""),
    "config a list": lambda d: (d / "config.json").write_text("[]"),
    "config an empty object": lambda d: (d / "config.json").write_text("{}"),
    "config binary": lambda d: (d / "config.json").write_bytes(bytes(range(256))),
    "config of an unknown kind": lambda d: (d / "config.json").write_text('{"model_type": "xyzzy"}'),
    "config of an unknown architecture": lambda d: edit_json(d / "config.json", architectures=["Xyzzy"]),
    "config with a word for a number": lambda d: edit_json(d / "config.json", vocab_size="many"),
}


@pytest.mark.parametrize("damage", DRAFTS.values(), ids=DRAFTS)
def test_a_damaged_draft_is_refused_in_one_sentence(pair, tmp_path, damage):
    directory = Path(shutil.copytree(pair.draft, tmp_path / "draft"))
    damage(directory)
    refused(pair.target, user_config(pair, model=str(directory)), "speculative_config.model", str(directory))


def test_a_draft_with_another_vocabulary_is_refused_in_one_sentence(pair):
    refused(pair.target, user_config(pair, model=str(pair.other_draft)), "vocabulary")


RECIPES_GONE_WRONG = {
    "not json": (b"hello", "cospec.json"),
    "empty": (b"", "cospec.json"),
    "truncated": (b'{"model": "x', "cospec.json"),
    "binary": (bytes(range(256)), "cospec.json"),
    "other encoding": ('{"modèle": 1}'.encode("latin-1"), "cospec.json"),
    "a list": ([1, 2], "cospec.json: must hold a JSON object, got list"),
    "a number": (5, "cospec.json: must hold a JSON object"),
    "null": (None, "cospec.json: must hold a JSON object"),
    "a string": ("typical", "cospec.json: must hold a JSON object"),
    "too large": (b" " * (MAX_RECIPE_BYTES + 1), "cospec.json: larger than"),
    "nested without end": (b"[" * 100_000 + b"]" * 100_000, "cospec.json"),
    "nested objects without end": (b'{"arbiter":' * 50_000 + b"1" + b"}" * 50_000, "cospec.json"),
    "number of 5000 digits": (b'{"exact_tokens": ' + b"9" * 5000 + b"}", "cospec.json"),
    "nothing in it": ({}, "speculative_config.arbiter: missing"),
    "unknown key": ({"treshold": 1}, "cospec.json.treshold: unknown key (value 1); did you mean 'threshold'?"),
    "key of 5000 characters": ({"x" * 5000: 1}, "cospec.json"),
    "key with a line break": ({"a\nb": 1}, "cospec.json"),
    "value of 5000 characters": ({"xyzzy": "x" * 5000}, "cospec.json.xyzzy"),
    "threshold text": ({"arbiter": "./arbiter", "threshold": "high"}, "threshold"),
    "threshold nan": ({"arbiter": "./arbiter", "threshold": NAN}, "threshold"),
    "two knobs": ({"arbiter": "./arbiter", "threshold": 0.5, "max_accuracy_loss": 0.1}, "max_accuracy_loss exclude"),
    "knob for a rule": ({"arbiter": {"policy": "typical"}, "threshold": 0.5}, "threshold is for a trained arbiter"),
    "model a number": ({"model": 5}, "speculative_config.model"),
    "model nowhere": ({"model": "../nowhere"}, "speculative_config.model: no model at"),
    "model in a loop": ({"model": "./loop"}, "speculative_config.model"),
    "model with a null byte": ({"model": "./a\0b"}, "speculative_config.model"),
    "model of 5000 characters": ({"model": "./" + "x" * 5000}, "speculative_config.model"),
    "model with a lone surrogate": ({"model": "./\ud800"}, "speculative_config.model"),
    "model of another vocabulary": ({"model": "../other"}, "vocabulary"),
    "arbiter a number": ({"arbiter": 5}, "speculative_config.arbiter"),
    "arbiter a list": ({"arbiter": ["./arbiter"]}, "speculative_config.arbiter"),
    "arbiter nowhere": ({"arbiter": "./nowhere"}, "speculative_config.arbiter: no directory at"),
    "arbiter in a loop": ({"arbiter": "./loop"}, "speculative_config.arbiter"),
    "arbiter with a lone surrogate": ({"arbiter": "./\ud800"}, "speculative_config.arbiter"),
    "arbiter in the home of nobody": ({"arbiter": "~no-such-user/x"}, "speculative_config.arbiter"),
    "arbiter a policy's name": ({"arbiter": "typical"}, "speculative_config.arbiter"),
    "artefact a number": ({"arbiter": {"policy": "learned", "artefact": 5}}, "speculative_config.arbiter.artefact"),
    "artefact nowhere": ({"arbiter": {"policy": "learned", "artefact": "./nowhere"}}, "speculative_config.arbiter"),
    "number of tokens text": ({"num_speculative_tokens": "5"}, "speculative_config.num_speculative_tokens"),
}


@pytest.mark.parametrize(("content", "names"), RECIPES_GONE_WRONG.values(), ids=RECIPES_GONE_WRONG)
def test_a_malformed_recipe_is_refused_in_one_sentence(pair, tmp_path, content, names):
    target = Path(shutil.copytree(pair.target, tmp_path / "target"))
    (tmp_path / "other").symlink_to(pair.other_draft)
    symlink_loop(target)
    if isinstance(content, dict) and content:
        complete = {"model": str(pair.draft), "num_speculative_tokens": 3, "arbiter": {"policy": "typical"}}
        content = complete | content
    write_recipe(target, content)
    refused(target, {"method": "cospec"}, names)


def test_a_recipe_that_cannot_be_read_is_an_error_even_when_nothing_of_it_is_needed(pair, tmp_path):
    target = Path(shutil.copytree(pair.target, tmp_path / "target"))
    write_recipe(target, b"{")
    refused(target, user_config(pair), "cospec.json")


def test_there_are_more_than_a_hundred_malformed_configurations():
    tables = (MALFORMED, ENGINE_SETTINGS, PATHS, PATHS, ARTEFACTS, DRAFTS, RECIPES_GONE_WRONG)
    assert sum(map(len, tables)) > 100
