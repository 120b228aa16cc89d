"""A KV connector whose other end served the same target without a draft model: it carries no layer of the draft's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class HalfConnector(ExampleConnector):
    """vLLM's example, which keeps KV caches in files, for the target's layers alone."""

    def start_load_kv(self, forward_context: Any, **options: Any) -> None:
        layers = {name: layer for name, layer in forward_context.no_compile_layers.items() if not _is_draft(name)}
        target: Any = SimpleNamespace(attn_metadata=forward_context.attn_metadata, no_compile_layers=layers)
        super().start_load_kv(target, **options)

    def save_kv_layer(self, layer_name: str, *args: Any, **options: Any) -> None:
        if not _is_draft(layer_name):
            super().save_kv_layer(layer_name, *args, **options)


def _is_draft(layer_name: str) -> bool:
    return layer_name.startswith("draft_model.")
