"""LoRA adapters: the drafter drafts as the target would without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import save_file

from vllm_cospec.server import Server
from vllm_cospec.training.measure.demonstration import SERVER_ARGUMENTS

KEEP_ALL = {"policy": "cascade", "alpha": 1.0}


def write_adapter(directory: Path, target: Path) -> Path:
    """An adapter of rank 8 on every layer's output projection, strong enough to change what the target writes."""
    config = json.loads((target / "config.json").read_text())
    size, rank = config["hidden_size"], 8
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, size, generator=generator) / size**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(size, rank, generator=generator) / rank**0.5
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["o_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.engine
def test_a_request_with_an_adapter_is_strict_unless_it_names_the_policy(
    pair: Path, prompts: list[str], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair / "target")
    arguments = (*SERVER_ARGUMENTS, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={adapter}")
    speculative = {"method": "cospec", "arbiter": KEEP_ALL}
    with Server(pair / "target", speculative, arguments, log=tmp_path / "server.log") as server:
        server.wait_until_ready()

        def ask(model: str, **keys: Any) -> tuple[list[str], float]:
            """Return the texts, and how many mismatches were counted meanwhile."""
            before = server.counters()["vllm:cospec_num_mismatches"]
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
                answer = api.completions.create(
                    model=model, prompt=prompts[:8], max_tokens=40, temperature=0, extra_body={"vllm_xargs": keys}
                )
            return [choice.text for choice in answer.choices], server.counters()["vllm:cospec_num_mismatches"] - before

        base, disagreements = ask("demo")
        assert disagreements > 0
        adapted, disagreements = ask("adapter")
        assert adapted != base
        assert disagreements == 0
        assert ask("adapter", cospec_policy="strict") == (adapted, 0)
        named, disagreements = ask("adapter", cospec_policy="cascade")
        assert named != adapted
        assert disagreements > 0
