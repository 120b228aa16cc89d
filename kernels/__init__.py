"""Arbitration: the reference, the CPU path and the Triton kernels.

Nothing here imports from ``vllm_cospec`` but from this package itself.
"""

UNLIMITED = 2**31 - 1
"""``max_overrides`` of a request without a limit, on every path."""
