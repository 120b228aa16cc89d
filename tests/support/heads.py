"""Heads with random weights: they propose nonsense, which is enough to see what becomes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARED = "12+34+56+78-90*2+12+34+56+78-90"  # with the token in front of every text, one block of the cache
NEXT = "*2+12+34+56+78-90*2+12+34+56+78-"  # another one
FAMILY = [SHARED + "+5*(19-8)+7*(81-46)-3*(7+5)*2-64?", *(SHARED + NEXT + f"{i}*{i + 4}?" for i in range(1, 17))]
"""Prompts that part where a block of 32 tokens ends: the first from the others after one, these after two."""


def random_head(directory: Path, pair: Path, eagle3: bool) -> Path:
    """Write a one-layer EAGLE or EAGLE-3 head with random weights that fits the bundled target."""
    config = json.loads((pair / "target" / "config.json").read_text())
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    layer = "midlayer" if eagle3 else "layers.0"
    width = 2 * hidden if eagle3 else hidden
    tensors = {
        "fc.weight": random(hidden, 3 * hidden if eagle3 else 2 * hidden),
        **{f"{layer}.self_attn.{name}_proj.weight": random(hidden, width) for name in "qkv"},
        f"{layer}.self_attn.o_proj.weight": random(hidden, hidden),
        f"{layer}.mlp.gate_proj.weight": random(inner, hidden),
        f"{layer}.mlp.up_proj.weight": random(inner, hidden),
        f"{layer}.mlp.down_proj.weight": random(hidden, inner),
        f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
    }
    if eagle3:
        tensors |= {
            f"{layer}.hidden_norm.weight": torch.ones(hidden),
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            "norm.weight": torch.ones(hidden),
            "lm_head.weight": random(vocabulary, hidden),
        }
        config |= {
            "draft_vocab_size": vocabulary,
            "architectures": ["LlamaForCausalLMEagle3"],
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],  # vLLM's default names a layer twice in so small a target
        }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "tie_word_embeddings": False}))
    return directory


def random_target(directory: Path, pair: Path, num_modules: int = 1) -> Path:
    """Write a two-layer MiMo with one MTP layer and random weights, with the bundled pair's tokenizer.

    ``num_modules``: of the MTP head, as the configuration says.
    """
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
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_nextn_predict_layers": num_modules,
        "vocab_size": vocabulary, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "rms_norm_eps": 1e-6, "dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def random_parallel_head(directory: Path, pair: Path, dspark: bool) -> Path:
    """Write a one-layer DFlash or DSpark head with random weights that fits the bundled target."""
    config = json.loads((pair / "target" / "config.json").read_text())
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    generator = torch.Generator().manual_seed(6)
    layers, rank = [1, 2], 8  # of the target, whose states it reads; of DSpark's second stage

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {
        "fc.weight": random(hidden, len(layers) * hidden),
        "hidden_norm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
        **{f"layers.0.self_attn.{name}_proj.weight": random(hidden, hidden) for name in "qkvo"},
        **{f"layers.0.self_attn.{name}_norm.weight": torch.ones(config["head_dim"]) for name in "qk"},
        "layers.0.mlp.gate_proj.weight": random(inner, hidden),
        "layers.0.mlp.up_proj.weight": random(inner, hidden),
        "layers.0.mlp.down_proj.weight": random(hidden, inner),
        "layers.0.input_layernorm.weight": torch.ones(hidden),
        "layers.0.post_attention_layernorm.weight": torch.ones(hidden),
    }
    if dspark:
        tensors |= {f"markov_head.markov_w{i}.weight": random(vocabulary, rank) * 10 for i in (1, 2)}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "architectures": ["Qwen3DSparkModel" if dspark else "DFlashDraftModel"], "model_type": "qwen3",
        "num_hidden_layers": 1, "tie_word_embeddings": False, "markov_rank": rank, "block_size": 3,
        "dflash_config": {"target_layer_ids": layers, "mask_token_id": 3},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory
