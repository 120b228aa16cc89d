"""A KV connector that does not get what it was to load, and says so when the step that needed it is over."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector, ExampleConnectorMetadata


class FailingConnector(ExampleConnector):
    """vLLM's example, which keeps KV caches in files and finds none of them again."""

    def start_load_kv(self, forward_context: Any, **options: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ExampleConnectorMetadata)
        self._failed = {
            int(slot) // self._block_size
            for request in metadata.requests
            if not request.is_store
            for slot in request.slot_mapping
        }

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._failed
