"""Adapters between vLLM's model runners and the kernels."""
