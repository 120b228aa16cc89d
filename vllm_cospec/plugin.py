"""The entry point vLLM calls in every process."""

from __future__ import annotations

from vllm.logger import init_logger

from vllm_cospec import compat
from vllm_cospec.translate import make_create_speculative_config

logger = init_logger("vllm.cospec")


def register() -> None:
    """Teach vLLM the method "cospec". Idempotent; without the method in use nothing else changes.

    A vLLM that lacks the one hook this needs keeps serving without cospec; the log says why cospec is not there.
    """
    target = "vllm.engine.arg_utils:EngineArgs.create_speculative_config"
    status = next(compat.check_hook(hook) for hook in compat.HOOKS if hook.target == target)
    if status.status != "found":
        logger.error(
            "cospec is not available: vLLM %s, %s is %s (%s)",
            compat.vllm_version(),
            target,
            status.status,
            status.detail,
        )
        return
    compat.replace(target, make_create_speculative_config)
