"""A multi-token-prediction layer, as far as random weights show: it loads, it is arbitrated, strict is stock."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

RunEngine = Callable[..., dict[str, Any]]


def random_target(directory: Path, pair: Path) -> Path:
    """Write a two-layer MiMo with one MTP layer and random weights, with the bundled pair's tokenizer."""
    shutil.copytree(pair / "target", directory, ignore=shutil.ignore_patterns("*.safetensors", "cospec.json"))
    hidden, inner, vocabulary = 64, 128, json.loads((directory / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    def block(prefix: str) -> dict[str, torch.Tensor]:
        return {
            **{f"{prefix}.self_attn.{name}_proj.weight": random(hidden, hidden) for name in "qkvo"},
            **{f"{prefix}.self_attn.{name}_proj.bias": random(hidden) for name in "qkv"},
            f"{prefix}.mlp.gate_proj.weight": random(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": random(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": random(hidden, inner),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
        }

    tensors = {
        "model.embed_tokens.weight": random(vocabulary, hidden),
        "lm_head.weight": random(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden),
        **block("model.layers.0"),
        **block("model.layers.1"),
        **block("model.mtp_layers.0"),
        **{f"model.mtp_layers.0.{name}_layernorm.weight": torch.ones(hidden) for name in ("token", "hidden", "final")},
        "model.mtp_layers.0.input_proj.weight": random(hidden, 2 * hidden),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_nextn_predict_layers": 1,
        "vocab_size": vocabulary, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "rms_norm_eps": 1e-6, "dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.engine
def test_an_mtp_layer_is_arbitrated(pair: Path, prompts: list[str], run_engine: RunEngine, tmp_path: Path) -> None:
    target = str(random_target(tmp_path / "mimo", pair))
    runs = [{"name": "run", "prompts": prompts[:40], "params": {"temperature": 0, "max_tokens": 30}}]
    stock = run_engine(runs, {"method": "mtp", "num_speculative_tokens": 2}, model=target)
    cospec = {"method": "cospec", "draft_method": "mtp", "num_speculative_tokens": 2}
    strict = run_engine(runs, cospec | {"arbiter": {"policy": "strict"}}, model=target)
    assert strict["runs"] == stock["runs"]
    some = run_engine(runs, cospec | {"arbiter": {"policy": "random", "rate": 0.3}, "collect": True}, model=target)
    assert some["metrics"]["vllm:cospec_num_overrides"] > 0
    assert some["decisions"]
