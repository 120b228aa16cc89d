"""The user's keys, split into this package's and vLLM's."""

import copy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from configurations import ENGINE_KEYS, LEFT_OUT, PARAMETERS, Pair, resolved, write_recipe

from vllm_cospec.config import OWN_KEYS, CoSpecConfig
from vllm_cospec.kernels.policies import Learned, Typical, policy_class, policy_names
from vllm_cospec.translate import resolve


def test_what_is_left_out_has_the_documented_default() -> None:
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


def test_every_field_of_ours_is_documented_and_none_is_passed_on_to_vllm(pair: Pair) -> None:
    fields = CoSpecConfig.model_fields
    assert set(fields) == OWN_KEYS == {
        "arbiter", "draft_method", "threshold", "max_accuracy_loss", "max_overrides", "exact_tokens", "collect",
        "max_regret", "request_settings", "on_mismatch", "scope", "thinking_tokens",
        "on_drift", "drift_pause",
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


def test_all_other_keys_go_to_vllm_untouched() -> None:
    _, inner = resolved(arbiter={"policy": "strict"}, draft_tensor_parallel_size=2, max_model_len=99)
    assert inner == {
        "model": "org/draft",
        "num_speculative_tokens": 3,
        "draft_tensor_parallel_size": 2,
        "max_model_len": 99,
    }


def test_the_inner_method_is_the_draft_method_and_never_cospec() -> None:
    _, inner = resolved(arbiter={"policy": "strict"}, draft_method="eagle3")
    assert inner["method"] == "eagle3"
    assert "method" not in resolved(arbiter={"policy": "strict"})[1]


def test_dashes_are_as_good_as_underscores(pair: Pair) -> None:
    config, inner = resolve(
        {"method": "cospec", "model": "org/draft", "num-speculative-tokens": 3, "max-overrides": 2,
         "arbiter": {"policy": "typical"}},
        "target",
        ENGINE_KEYS,
    )  # fmt: skip
    assert config.max_overrides == 2
    assert inner["num_speculative_tokens"] == 3


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_chosen_by_its_name(pair: Pair, name: str) -> None:
    parameters = {"artefact": str(pair.artefact)} if name == "learned" else PARAMETERS[name]
    config, _ = resolved(arbiter={"policy": name, **parameters})
    assert config.arbiter == policy_class(name)(**parameters)


def test_a_string_is_the_directory_of_a_trained_arbiter(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Learned(artefact=str(pair.artefact))
    assert resolved(arbiter=str(pair.artefact))[0].arbiter == expected
    assert resolved(arbiter={"policy": "learned", "artefact": str(pair.artefact)})[0].arbiter == expected
    monkeypatch.chdir(pair.artefact.parent)
    assert resolved(arbiter="arbiter")[0].arbiter == expected
    assert resolved(arbiter="./arbiter")[0].arbiter == expected
    monkeypatch.setenv("HOME", str(pair.artefact.parent))
    assert resolved(arbiter="~/arbiter")[0].arbiter == expected


def test_a_hub_id_is_fetched_without_anything_that_is_not_an_artefact(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repo: str, allow_patterns: list[str] | None = None, **_: Any) -> str:
        asked.append((repo, allow_patterns))
        return str(pair.artefact)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolved(arbiter="org/arbiter")[0].arbiter == Learned(artefact=str(pair.artefact))
    assert asked == [("org/arbiter", ["config.json", "model.safetensors", "README.md"])]


def test_ngram_needs_no_model() -> None:
    config, inner = resolved(arbiter={"policy": "typical"}, draft_method="ngram", model=LEFT_OUT)
    assert config.draft_method == "ngram"
    assert inner == {"method": "ngram", "num_speculative_tokens": 3}


def test_neither_the_users_dict_nor_what_is_in_it_is_changed(tmp_path: Path) -> None:
    target = write_recipe(tmp_path / "target", {"model": "org/draft", "exact_tokens": 3})
    raw = {"method": "cospec", "num-speculative-tokens": 3, "arbiter": {"policy": "typical"}, "draft_method": "eagle"}
    before = copy.deepcopy(raw)
    resolve(raw, str(target), ENGINE_KEYS)
    assert raw == before
