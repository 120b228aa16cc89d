"""Run by ``make compat``, with another vLLM's Python code laid over the CPU build: it is that version, and it fits."""

from __future__ import annotations

import vllm

from vllm_cospec import compat
from vllm_cospec.doctor import examine


def test_every_hook_is_there_in_every_scope() -> None:
    statuses = [(hook.target, compat.check_hook(hook)) for hook in compat.HOOKS]
    assert [(target, status) for target, status in statuses if status.status != "found"] == []


def test_the_version_is_supported_and_the_doctor_finds_nothing() -> None:
    assert compat.version_supported(compat.vllm_version()), vllm.__version__
    assert examine()["ok"]
