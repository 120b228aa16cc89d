"""Training configurations: those that ship are valid, and bad ones are refused by field."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import TrainConfig, bundled, load_train_config

CONFIGS = Path(__file__).parents[3] / "training" / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_valid(path: Path) -> None:
    load_train_config(path)


def test_the_bundled_pair_is_found_by_name() -> None:
    pair = load_train_config(CONFIGS / "demo.toml").pair
    assert Path(pair.target) == bundled("target")
    assert (Path(str(pair.draft)) / "config.json").exists()


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "run.toml").write_text(
        '[pair]\ntarget="t"\ndraft="org/draft"\nnum_speculative_tokens=3\n'
        '[task]\nname="jsonl"\n[task.options]\npath="./p.jsonl"\n'
    )
    config = load_train_config(tmp_path / "run.toml")
    assert config.pair.target == str(tmp_path / "t")
    assert config.pair.draft == "org/draft"
    assert config.task.options["path"] == str(tmp_path / "p.jsonl")


PAIR = '[pair]\ntarget="a/b"\ndraft="c/d"\nnum_speculative_tokens=3\n'
BAD = {
    "no TOML": ("iterations = ", "not valid TOML"),
    "no pair": ("iterations = 3", "pair: missing"),
    "unknown table": (PAIR + "[learning]\n", "learning: unknown key"),
    "unknown key": (PAIR + "[learner]\nlr=1.0\n", "learner.lr: unknown key"),
    "wrong type": ("iterations='many'\n" + PAIR, "iterations: .*got 'many'"),
    "below": ("iterations=0\n" + PAIR, "iterations: .*got 0"),
    "not a number": (PAIR + "[learner]\nlearning_rate=nan\n", "learner.learning_rate: .*got nan"),
    "negative": (PAIR + "[learner]\nlearning_rate=-1.0\n", "learner.learning_rate: .*got -1.0"),
    "no draft": ('[pair]\ntarget="a/b"\nnum_speculative_tokens=3\n', "draft: missing"),
    "several greedy continuations": (
        PAIR + "[rollout]\ncontinuations_per_action=3\n",
        "rollout.continuations_per_action: 3 greedy continuations are all the same; use 1",
    ),
    "no tokens at all": (PAIR + "[rollout]\ntop_p=0.0\n", "rollout.top_p: .*got 0.0"),
    "branch without branches": (PAIR + "[rollout]\nbranches_per_response=0\n", "branches_per_response: 0 leaves"),
    "group of one": (PAIR + '[learner]\nadvantage="group"\n', "responses_per_prompt: 1 is too few"),
    "only warm start": ("iterations=4\n" + PAIR, "warm_start_iterations: 4 must be less than iterations=4"),
    "three layers": (PAIR + "[learner]\nhidden_sizes=[8,8,8]\n", "learner.hidden_sizes: "),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_configuration_is_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_train_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read"):
        load_train_config(tmp_path / "nowhere.toml")


def test_every_setting_is_documented() -> None:
    def walk(model: type) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            nested = field.annotation
            if hasattr(nested, "model_fields"):
                walk(nested)
            else:
                assert field.description, f"{model.__name__}.{name}"

    walk(TrainConfig)
