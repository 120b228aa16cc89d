"""Every configuration that ships is loaded, checked and planned, on random models of the same architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gsm8k import gsm8k
from transformers import LlamaConfig, Qwen3Config

from vllm_cospec.errors import ConfigError
from vllm_cospec.training.config import TrainConfig, bundled, load_train_config
from vllm_cospec.training.pairs.demo import build_tokenizer
from vllm_cospec.training.plan import work_of
from vllm_cospec.training.preflight import check_training

CONFIGS = Path(__file__).parents[3] / "training" / "configs"
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 4096,
}  # fmt: skip
KINDS = {"qwen3": Qwen3Config, "llama31_eagle3": LlamaConfig, "llama33_70b": LlamaConfig}
# updates, units of all of them, responses, branches at most
PLANS = {
    "code": None,
    "code_gpu": None,
    "demo": (60, 240, 30_720, 61_440),
    "demo_branch_cold": None,
    "demo_group_cold": None,
    "llama31_eagle3": (120, 960, 30_720, 122_880),
    "llama33_70b": (120, 480, 30_720, 122_880),
    "qwen3": (120, 960, 30_720, 122_880),
    "smollm2": (14, 28, 672, 1344),
}


def random_model(directory: Path, kind: type[Any]) -> str:
    kind(**SHAPE).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def shipped(name: str, directory: Path) -> TrainConfig:
    """A shipped configuration with what can be had here in place of its models and files."""
    config = load_train_config(CONFIGS / f"{name}.toml")
    pair, task = config.pair, config.task
    if name in KINDS:
        model = random_model(directory / "model", KINDS[name])
        pair = pair.model_copy(update={"target": model, "draft": model})
        data = gsm8k(directory / "gsm8k")
        options = {"path": str(data / "train.jsonl"), "test_path": str(data / "test.jsonl")}
        task = task.model_copy(update={"options": task.options | options})
    elif not name.startswith("demo"):  # pairs that are built on a user's machine
        pair = pair.model_copy(update={role: str(bundled(role)) for role in ("target", "draft")})
        if name.startswith("code"):
            task = task.model_copy(update={"options": task.options | {"tokenizer": str(bundled("target"))}})
    return config.model_copy(update={"pair": pair, "task": task})


def test_every_configuration_is_here() -> None:
    assert sorted(PLANS) == sorted(path.stem for path in CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("name", PLANS)
def test_a_shipped_configuration_can_be_checked_and_planned(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    config = shipped(name, tmp_path)
    found = work_of(config, check_training(config, said.append))
    assert said == []  # no prompt is left out
    expected = PLANS[name]
    if expected is not None:
        assert (found.updates, found.units, found.responses, found.branches) == expected
    if name in KINDS:
        assert found.splits["test"] == 1319
        assert sum(found.splits.values()) == 7473 + 1319
        assert found.splits["calibration"] >= config.calibration.problems


def test_an_engine_of_several_ranks_needs_as_many_gpus() -> None:
    config = load_train_config(CONFIGS / "llama33_70b.toml")
    assert config.pair.ranks == config.rollout.gpus_per_actor == 4
    raw = config.model_dump()
    raw["rollout"]["gpus_per_actor"] = 1.0
    with pytest.raises(ValueError, match=r"rollout.gpus_per_actor: 1 is too few for an engine of 4 ranks .* to 4"):
        TrainConfig.model_validate(raw)
    raw["rollout"]["gpus_per_actor"] = 0.0  # on CPUs
    TrainConfig.model_validate(raw)


@pytest.mark.parametrize("gpus", [0.0, 1.5])
def test_ranks_that_are_ray_actors_take_a_whole_gpu_each(gpus: float) -> None:
    raw = load_train_config(CONFIGS / "qwen3.toml").model_dump()
    raw["pair"]["engine"]["distributed_executor_backend"] = "ray"
    raw["rollout"]["gpus_per_actor"] = 1.0
    assert TrainConfig.model_validate(raw).pair.ranks_are_ray_actors
    raw["rollout"]["gpus_per_actor"] = gpus
    with pytest.raises(ValueError, match=rf"gpus_per_actor: {gpus:g}, but ranks that are Ray actors .* set it to 1"):
        TrainConfig.model_validate(raw)


def test_labels_are_those_of_branches() -> None:
    raw = load_train_config(CONFIGS / "qwen3.toml").model_dump()
    assert raw["learner"]["objective"] == "labels"
    raw["learner"]["advantage"] = "group"
    raw["rollout"]["responses_per_prompt"] = 4
    with pytest.raises(ValueError, match=r'learner.objective: "labels" are those of branches; set learner.advantage'):
        TrainConfig.model_validate(raw)


def test_gsm8k_is_too_small_for_500_calibration_problems(tmp_path: Path) -> None:
    config = shipped("qwen3", tmp_path)
    more = config.model_copy(update={"calibration": config.calibration.model_copy(update={"problems": 700})})
    with pytest.raises(ConfigError, match=r"calibration.problems: 700 problems are asked for; .* problems for calib"):
        check_training(more)
