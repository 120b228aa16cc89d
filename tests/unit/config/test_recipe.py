"""``cospec.json`` beside the target, in a directory or in a repository of the hub."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from configurations import (
    ENGINE_KEYS,
    NAN,
    Pair,
    build,
    refused,
    symlink_loop,
    user_config,
    write_artefact,
    write_recipe,
)

from vllm_cospec.config import CoSpecConfig
from vllm_cospec.errors import ConfigError
from vllm_cospec.kernels.policies import Learned, Typical
from vllm_cospec.recipe import MAX_RECIPE_BYTES, Hub
from vllm_cospec.translate import resolve


def test_a_recipe_beside_the_target_says_everything(pair: Pair, tmp_path: Path) -> None:
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


def test_explicit_keys_win_over_the_recipe_and_the_rest_stays(pair: Pair, tmp_path: Path) -> None:
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


def test_an_arbiter_replaces_the_recipes_whole_and_does_not_inherit_its_parameters(tmp_path: Path) -> None:
    target = write_recipe(
        tmp_path / "target",
        {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": {"policy": "typical", "posterior_alpha": 0.9}},
    )
    config, _ = resolve({"method": "cospec", "arbiter": {"policy": "typical"}}, str(target), ENGINE_KEYS)
    assert config.arbiter == Typical()


@pytest.mark.parametrize("style", ["../{0}", "./../{0}", "{0}"])
@pytest.mark.parametrize("as_object", [False, True])
def test_paths_of_a_recipe_are_relative_to_it(pair: Pair, tmp_path: Path, style: str, as_object: bool) -> None:
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


def test_a_recipe_of_a_target_given_by_a_relative_path_is_found(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pair.draft, tmp_path / "draft")
    write_recipe(
        tmp_path / "target", {"model": "../draft", "num_speculative_tokens": 3, "arbiter": {"policy": "strict"}}
    )
    monkeypatch.chdir(tmp_path)
    assert resolve({"method": "cospec"}, "target", ENGINE_KEYS)[1]["model"] == str(tmp_path / "draft")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve({"method": "cospec"}, "../target", ENGINE_KEYS)[1]["model"] == str(tmp_path / "draft")


def test_paths_a_user_writes_are_relative_to_the_working_directory_and_hub_ids_stay(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_recipe(
        tmp_path / "target", {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": {"policy": "strict"}}
    )
    assert resolve({"method": "cospec"}, str(target), ENGINE_KEYS)[1]["model"] == "org/draft"
    shutil.copytree(pair.artefact, tmp_path / "here" / "mine")
    config, _ = resolve({"method": "cospec", "arbiter": "./mine"}, str(target), ENGINE_KEYS)
    assert config.arbiter == Learned(artefact=str(tmp_path / "here" / "mine"))


@pytest.mark.parametrize("knob", ["threshold", "max_accuracy_loss"])
@pytest.mark.parametrize("recipes", ["threshold", "max_accuracy_loss"])
def test_an_explicit_knob_replaces_the_one_of_the_recipe(pair: Pair, tmp_path: Path, knob: str, recipes: str) -> None:
    content = {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": str(pair.artefact), recipes: 0.4}
    target = write_recipe(tmp_path / "target", content)
    config, _ = resolve({"method": "cospec", knob: 0.2}, str(target), ENGINE_KEYS)
    expected = {"threshold": None, "max_accuracy_loss": None} | {knob: 0.2}
    assert {name: getattr(config, name) for name in expected} == expected
    unchanged, _ = resolve({"method": "cospec", "exact_tokens": 1}, str(target), ENGINE_KEYS)
    assert getattr(unchanged, recipes) == 0.4


@pytest.mark.parametrize("recipes", ["threshold", "max_accuracy_loss"])
@pytest.mark.parametrize("rule", [True, False])
def test_the_recipes_knob_goes_with_the_recipes_arbiter(pair: Pair, tmp_path: Path, recipes: str, rule: bool) -> None:
    content = {"model": "org/draft", "num_speculative_tokens": 3, "arbiter": str(pair.artefact), recipes: 0.4}
    target = write_recipe(tmp_path / "target", content)
    arbiter = {"policy": "typical"} if rule else str(write_artefact(tmp_path / "mine"))
    config, _ = resolve({"method": "cospec", "arbiter": arbiter}, str(target), ENGINE_KEYS)
    assert (config.threshold, config.max_accuracy_loss) == (None, None)


def test_a_rule_in_place_of_the_recipes_arbiter_is_not_bound_to_what_that_was_calibrated_for(
    pair: Pair, tmp_path: Path
) -> None:
    content = {
        "model": "org/draft", "num_speculative_tokens": 3, "arbiter": str(pair.artefact), "on_mismatch": "refuse",
    }  # fmt: skip
    target = write_recipe(tmp_path / "target", content)
    assert resolve({"method": "cospec"}, str(target), ENGINE_KEYS)[0].on_mismatch == "refuse"
    assert resolve({"method": "cospec", "threshold": 0.2}, str(target), ENGINE_KEYS)[0].on_mismatch == "refuse"
    rule, _ = resolve({"method": "cospec", "arbiter": {"policy": "typical"}}, str(target), ENGINE_KEYS)
    assert rule.on_mismatch == "warn"


asked: list[tuple[str, dict[str, Any]]] = []  # of the hub: (repository, how)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub with one repository, org/target, in this directory; only what is asked for is downloaded."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()
    asked.clear()

    def fetch(path: str) -> None:
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / path, cache / path)

    def hf_hub_download(repo: Any, filename: Any, **how: Any) -> Any:
        asked.append((repo, how))
        if repo != "org/target" or not (remote / filename).is_file():
            raise OSError(f"{repo} has no {filename}")
        fetch(filename)
        return str(cache / filename)

    def snapshot_download(repo: Any, allow_patterns: Any = None, **how: Any) -> Any:
        asked.append((repo, how))
        if repo not in ("org/target", "org/arbiter"):
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


def test_the_recipe_of_a_repository_is_used(hub: Path) -> None:
    write_recipe(hub, {"model": "org/draft", "num_speculative_tokens": 6, "arbiter": {"policy": "typical"}})
    config, inner = resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)
    assert config.arbiter == Typical()
    assert inner == {"model": "org/draft", "num_speculative_tokens": 6}


@pytest.mark.parametrize("arbiter", ["arbiter", "./arbiter"])
def test_an_arbiter_inside_the_repository_of_the_recipe_is_found(hub: Path, arbiter: str) -> None:
    write_artefact(hub / "arbiter")
    write_recipe(hub, {"model": "org/draft", "num_speculative_tokens": 6, "arbiter": arbiter})
    config, _ = resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)
    assert isinstance(config.arbiter, Learned)
    assert Path(config.arbiter.artefact, "model.safetensors").is_file()


@pytest.mark.parametrize("path", ["../../arbiter", "arbiter/../../../x", "/etc", "./../x"])
@pytest.mark.parametrize("key", ["model", "arbiter", "artefact"])
def test_the_recipe_of_a_repository_cannot_point_out_of_it(hub: Path, key: str, path: str) -> None:
    content = {"model": "org/draft", "num_speculative_tokens": 6, "arbiter": {"policy": "typical"}}
    content |= {"arbiter": {"policy": "learned", "artefact": path}} if key == "artefact" else {key: path}
    write_recipe(hub, content)
    with pytest.raises(ConfigError, match="leaves the repository"):
        resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)


OURS = {"cache_dir": "/cache", "token": "secret"}


@pytest.mark.parametrize("model", ["./draft", "draft"])
def test_recipe_draft_and_arbiter_come_from_the_targets_revision(hub: Path, pair: Pair, model: Any) -> None:
    shutil.copytree(pair.draft, hub / "draft")
    write_artefact(hub / "arbiter")
    write_recipe(hub, {"model": model, "num_speculative_tokens": 6, "arbiter": "./arbiter"})
    config, inner = resolve({"method": "cospec"}, "org/target", ENGINE_KEYS, Hub(revision="v2", **OURS))
    assert Path(inner["model"], "config.json").is_file()
    assert isinstance(config.arbiter, Learned)
    assert Path(config.arbiter.artefact, "model.safetensors").is_file()
    assert asked == 3 * [("org/target", {"revision": "v2", **OURS})]


@pytest.mark.parametrize(("written", "revision"), [("", None), ("@v1.2", "v1.2"), ("@refs/pr/3", "refs/pr/3")])
def test_an_arbiter_of_the_hub_has_a_revision_of_its_own(hub: Path, written: Any, revision: Any) -> None:
    raw = {"method": "cospec", "model": "org/draft", "num_speculative_tokens": 3, "arbiter": f"org/arbiter{written}"}
    resolve(raw, "org/target", ENGINE_KEYS, Hub(revision="v2", **OURS))
    assert asked[1:] == [("org/arbiter", {"revision": revision, **OURS})]


def test_vllm_hands_over_how_it_reaches_the_hub(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def snapshot_download(repo: Any, **how: Any) -> Any:
        fetched.append((repo, how["revision"], how["cache_dir"], how["token"]))
        return str(pair.artefact)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    build(
        pair.target,
        user_config(pair, arbiter="org/arbiter@v3"),
        download_dir="/cache",
        hf_token="secret",
        revision="v2",
    )
    assert fetched == [("org/arbiter", "v3", "/cache", "secret")]


def test_a_directory_with_an_at_sign_is_a_directory(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.artefact, tmp_path / "here" / "mine@v1")
    raw = {"method": "cospec", "model": "org/draft", "num_speculative_tokens": 3, "arbiter": "mine@v1"}
    config, _ = resolve(raw, "target", ENGINE_KEYS)
    assert config.arbiter == Learned(artefact=str(tmp_path / "here" / "mine@v1"))


def test_a_repository_without_a_recipe_asks_for_the_keys(hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"speculative_config\.arbiter: missing"):
        resolve({"method": "cospec"}, "org/target", ENGINE_KEYS)


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
def test_a_malformed_recipe_is_refused_in_one_sentence(pair: Pair, tmp_path: Path, content: Any, names: str) -> None:
    target = Path(shutil.copytree(pair.target, tmp_path / "target"))
    (tmp_path / "other").symlink_to(pair.other_draft)
    symlink_loop(target)
    if isinstance(content, dict) and content:
        complete = {"model": str(pair.draft), "num_speculative_tokens": 3, "arbiter": {"policy": "typical"}}
        content = complete | content
    write_recipe(target, content)
    refused(target, {"method": "cospec"}, names)


def test_a_recipe_that_cannot_be_read_is_an_error_even_when_nothing_of_it_is_needed(pair: Pair, tmp_path: Path) -> None:
    target = Path(shutil.copytree(pair.target, tmp_path / "target"))
    write_recipe(target, b"{")
    refused(target, user_config(pair), "cospec.json")
