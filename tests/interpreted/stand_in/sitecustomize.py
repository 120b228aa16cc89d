"""On PYTHONPATH, this lets every process of a test, vLLM's own included, interpret Triton kernels without a GPU."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from vllm_cospec.kernels.triton.stand_in import install

    install()
