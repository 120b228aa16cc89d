"""Arbitration: the reference, the CPU path and the Triton kernels."""
