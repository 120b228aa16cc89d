"""EAGLE and EAGLE-3 heads, as far as random weights show: they load, their drafts are arbitrated, strict is stock.

A random head proposes nonsense, so nothing can be said about acceptance; what is shown is that its logits are kept for
the right rows and that verification is what it should be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

RunEngine = Callable[..., dict[str, Any]]
GREEDY = {"temperature": 0, "max_tokens": 30}


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


@pytest.mark.engine
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_heads_are_arbitrated(
    method: str, pair: Path, prompts: list[str], run_engine: RunEngine, tmp_path: Path
) -> None:
    head = random_head(tmp_path / method, pair, eagle3=method == "eagle3")
    keys = {"model": str(head), "num_speculative_tokens": 3}
    runs = [{"name": "run", "prompts": prompts[:40], "params": GREEDY}]
    stock = run_engine(runs, {"method": method, **keys})
    cospec = {"method": "cospec", "draft_method": method, **keys}
    strict = run_engine(runs, cospec | {"arbiter": {"policy": "strict"}})
    assert strict["runs"] == stock["runs"]
    some = run_engine(runs, cospec | {"arbiter": {"policy": "random", "rate": 0.3}, "collect": True})
    assert some["metrics"]["vllm:cospec_num_overrides"] > 0
    assert some["decisions"]
