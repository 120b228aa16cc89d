"""What replaces symbols of vLLM's front end where cospec is asked for, see the ledger in compat.py."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_cospec import compat
from vllm_cospec.errors import ConfigError, CoSpecError

logger = init_logger("vllm.cospec")


def print_the_sentence_alone() -> None:
    """Where vLLM's own command runs, let it end with the sentence alone: fifty lines of its frames show no way out.

    A program that builds an LLM keeps its traceback, which leads to the line that has to change.
    """
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if Path(sys.argv[0]).name != "vllm" and not (spec and spec.name.startswith("vllm.")):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, CoSpecError):
            print(f"cospec: {error}", file=sys.stderr)
        else:
            usual(kind, error, trace)

    usual = compat.wrap("sys:excepthook", sys, hook)


def replace_front_end() -> None:
    """Replace what a front end with cospec needs: 400 for bad requests, counters on /metrics and in the log."""
    compat.replace("vllm.v1.engine.input_processor:InputProcessor._validate_params", _make_validate_params)
    compat.replace("vllm.v1.metrics.loggers:LoggingStatLogger.log", _make_log)

    def prom(original: Any) -> Any:
        from vllm_cospec.metrics import CoSpecDecodingProm

        return CoSpecDecodingProm

    compat.replace("vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls", prom)


def _make_validate_params(original: Any) -> Any:
    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, params, *args, **kwargs)
        settings = getattr(self.speculative_config, "cospec", None)
        if settings is not None:
            from vllm.exceptions import VLLMValidationError
            from vllm.sampling_params import SamplingParams

            from vllm_cospec.requests import request_settings

            if isinstance(params, SamplingParams):
                try:
                    request_settings(params, settings)
                except ConfigError as error:
                    raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        return result

    return _validate_params


def _make_log(original: Any) -> Any:
    @functools.wraps(original)
    def log(self: Any) -> None:
        original(self)
        from vllm_cospec.metrics import log_line

        line = log_line(self)
        if line is not None:
            logger.info(line)

    return log
