"""The shipped configurations run from preflight to artefact, on random models of the same architectures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gsm8k import gsm8k
from heads import random_head
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vllm_cospec.arbiter import load_artefact
from vllm_cospec.training.config import load_train_config
from vllm_cospec.training.pairs.demo import build_tokenizer

ROOT = Path(__file__).parents[2]
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 4096, "head_dim": 32,
    "tie_word_embeddings": False, "initializer_range": 0.5,
}  # fmt: skip


def random_model(directory: Path, name: str, seed: int) -> Path:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)) if name == "qwen3" else LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        pytest.param("llama31_eagle3", marks=pytest.mark.slow),
        pytest.param("llama33_70b", marks=pytest.mark.slow),
    ],
)
def test_a_shipped_configuration_runs_from_preflight_to_artefact(name: str, tmp_path: Path) -> None:
    target = random_model(tmp_path / "target", name, 1)
    eagle = name == "llama31_eagle3"
    draft = (
        random_head(tmp_path / "draft", tmp_path, eagle3=True) if eagle else random_model(tmp_path / "draft", name, 2)
    )
    data = gsm8k(tmp_path / "gsm8k")
    config = load_train_config(ROOT / "training" / "configs" / f"{name}.toml")
    raw = config.model_dump(mode="json", exclude_none=True)
    raw["pair"] |= {"target": str(target), "draft": str(draft)}
    ranks = min(2, raw["pair"]["engine"].get("tensor_parallel_size", 1))  # of four that the largest ships with
    raw["pair"]["engine"] = {
        "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16, "enforce_eager": True,
        "kv_cache_memory_bytes": 2**26, "tensor_parallel_size": ranks,
    }  # fmt: skip
    raw["task"] |= {"reward": "odd_rewards:odd"}
    raw["task"]["options"] |= {"path": str(data / "train.jsonl"), "test_path": str(data / "test.jsonl")}
    few = 8 // ranks  # ranks wait for each other
    raw["rollout"] |= {
        "actors": 1,
        "gpus_per_actor": 0.0,
        "cpus_per_actor": float(ranks),
        "prompts_per_iteration": few,
        "prompts_per_unit": few,
        "max_tokens": 3 * few,
    }
    if eagle:  # as shipped it is greedy; sampled it runs from end to end too, so hot that random drafts are legal
        raw["rollout"] |= {"temperature": 1.8, "top_p": 0.99}
    raw["learner"] |= {"warm_start_iterations": 1}
    raw["selection"] |= {"problems": 4}
    raw["calibration"] |= {"problems": 20, "thresholds": [0.5]}
    raw["iterations"] = 2
    file = tmp_path / "run.toml"
    file.write_text(toml(raw))
    if name == "qwen3":
        said = cospec("train", "--plan", "--probe", "8", "--config", str(file))
        assert "8 problems on one engine" in said
        assert "changed the answer" in said
    cospec("train", "--config", str(file), "--output", str(tmp_path / "run"))
    _, made = load_artefact(tmp_path / "run" / "arbiter")
    assert made.provenance.vocab_size == 100
    assert made.statement is not None
    conditions = made.statement.conditions
    assert (conditions.temperature, conditions.top_p) == (((1.8, 1.8), (0.99, 0.99)) if eagle else ((0, 0), (1, 1)))
    recorded = made.provenance.training_config["rollout"]
    assert (recorded["temperature"], recorded["top_p"]) == ((1.8, 0.99) if eagle else (0, 1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2]
    assert lines[0]["warm_start_labels"] > 0
    assert lines[1]["branches"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["code", "code_gpu", "demo_branch_cold", "demo_group_cold", "smollm2"])
def test_a_configuration_of_small_models_runs_from_preflight_to_artefact(name: str, tmp_path: Path) -> None:
    """As it is shipped but for how many of everything; pairs that are built on a user's machine are random Llamas."""
    config = load_train_config(ROOT / "training" / "configs" / f"{name}.toml")
    raw = config.model_dump(mode="json", exclude_none=True)
    bundled_pair = name.startswith("demo")
    if not bundled_pair:
        roles = enumerate(("target", "draft"), 1)
        raw["pair"] |= {role: str(random_model(tmp_path / role, name, seed)) for seed, role in roles}
        raw["task"] |= {"reward": "odd_rewards:odd"}
    if name.startswith("code"):
        raw["task"]["options"] |= {"tokenizer": raw["pair"]["target"]}
    raw["pair"]["engine"] |= {"kv_cache_memory_bytes": 2**26, "max_num_seqs": 16}
    raw["rollout"] |= {"actors": 1, "gpus_per_actor": 0.0, "prompts_per_iteration": 16, "prompts_per_unit": 8}
    warm = min(1, raw["learner"]["warm_start_iterations"])
    raw["learner"] |= {"warm_start_iterations": warm}
    raw["selection"] |= {"problems": 4}
    raw["calibration"] |= {"problems": 20, "thresholds": [0.5]}
    raw["iterations"] = 1 + warm
    file = tmp_path / "run.toml"
    file.write_text(toml(raw))
    responses = 16 * raw["rollout"]["responses_per_prompt"] * raw["iterations"]
    assert f"{responses} responses" in cospec("train", "--plan", "--config", str(file))
    cospec("train", "--config", str(file), "--output", str(tmp_path / "run"))
    _, made = load_artefact(tmp_path / "run" / "arbiter")
    assert made.statement is not None
    assert made.statement.conditions.dtype == config.pair.engine["dtype"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, 2 + warm))
    if warm:
        assert lines[0]["warm_start_labels"] > 0
    assert lines[-1]["mismatches_per_response"] > 0
    assert (lines[-1]["branches"] > 0) == (config.learner.advantage == "branch")


def cospec(*arguments: str) -> str:
    """Run the command; returns what it printed."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("cospec")), *arguments],
        env={
            **os.environ, "PYTHONPATH": str(ROOT / "tests" / "support"), "COLUMNS": "200",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM gives each rank a NUMA node of its own otherwise
        },
        capture_output=True, text=True, timeout=1700, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def toml(raw: dict[str, object]) -> str:
    """TOML with a table for each part; JSON's values are TOML's."""
    flat = {key: value for key, value in raw.items() if not isinstance(value, dict)}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in flat.items())
    for key, value in raw.items():
        if isinstance(value, dict):
            inner = {name: own for name, own in value.items() if not isinstance(own, dict)}
            text += f"[{key}]\n" + "".join(f"{name} = {json.dumps(own)}\n" for name, own in inner.items())
            for name, own in value.items():
                if isinstance(own, dict):
                    text += f"[{key}.{name}]\n" + "".join(f"{n} = {json.dumps(o)}\n" for n, o in own.items())
    return text
