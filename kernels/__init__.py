"""Arbitration: the reference, the CPU path and the Triton kernels.

Installed as ``vllm_cospec.kernels``; nothing here imports from ``vllm_cospec`` but from this package itself. In a
checkout this folder also answers to the name ``kernels`` for whatever runs with the checkout's root on its path
(``python -m ...`` started there), and transformers means another package by that.
"""

UNLIMITED = 2**31 - 1
"""``max_overrides`` of a request without a limit, on every path."""

if __name__ == "kernels":
    from vllm_cospec.kernels.shadowed import stand_aside

    stand_aside(__path__)
