"""Packaging. ``kernels/`` and ``training/`` stand at the top level and are installed below ``vllm_cospec``."""

from setuptools import setup

setup(
    packages=[
        "vllm_cospec",
        "vllm_cospec.demo",
        "vllm_cospec.runners",
        "vllm_cospec.workers",
        "vllm_cospec.kernels",
        "vllm_cospec.kernels.triton",
        "vllm_cospec.training",
        *(f"vllm_cospec.training.{room}" for room in ("learning", "measure", "pairs", "rollout", "tasks")),
        "vllm_cospec.training.pairs.code",
    ],
    package_dir={
        "vllm_cospec": "vllm_cospec",
        # A top-level package named "kernels" would shadow the one that transformers imports.
        "vllm_cospec.kernels": "kernels",
        "vllm_cospec.training": "training",
    },
    package_data={
        "vllm_cospec": ["py.typed"],
        "vllm_cospec.demo": ["*.md", "*/*"],
        "vllm_cospec.training": ["configs/*.toml"],
    },
)
