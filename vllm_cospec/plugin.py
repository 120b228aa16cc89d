"""The entry point vLLM calls in every process."""

from __future__ import annotations

from vllm.logger import init_logger

from vllm_cospec import compat, hooks
from vllm_cospec.arguments import make_add_cli_args
from vllm_cospec.speculators import make_maybe_override_with_speculators
from vllm_cospec.translate import make_create_speculative_config

logger = init_logger("vllm.cospec")

REPLACEMENTS = {
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": make_create_speculative_config,
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": make_add_cli_args,
    "vllm.engine.arg_utils:maybe_override_with_speculators": make_maybe_override_with_speculators,
}
"""What is replaced wherever the plugin is installed; the rest follows when a server asks for cospec."""


def register() -> None:
    """Teach vLLM the method "cospec". Idempotent; without the method in use nothing else changes.

    A vLLM that lacks one of the few hooks this needs keeps serving without cospec; the log says why it is not there.
    """
    for hook in hooks.HOOKS:
        status = compat.check_hook(hook) if hook.target in REPLACEMENTS else None
        if status and status.status != "found":
            logger.error(
                "cospec is not available: vLLM %s, %s is %s (%s)",
                compat.vllm_version(),
                hook.target,
                status.status,
                status.detail,
            )
            return
    for target, make in REPLACEMENTS.items():
        compat.replace(target, make)
