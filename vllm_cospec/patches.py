"""What replaces symbols of vLLM's front end where cospec is asked for, see ledger.py."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_cospec import compat, hooks, reports
from vllm_cospec.errors import ConfigError, CoSpecError
from vllm_cospec.requests import DECLARES_TOOLS, check_keys, check_sampling, keep_strict

logger = init_logger("vllm.cospec")


def under_vllms_command() -> bool:
    """Return whether vLLM's own command runs in this process, not a program that builds an engine."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or bool(spec and spec.name.startswith("vllm."))


@contextlib.contextmanager
def sentence_alone() -> Iterator[None]:
    """Where vLLM's own command runs, let an error of ours end it as one sentence: vLLM's frames show no way out.

    A program that builds an LLM keeps its traceback, which leads to the line that has to change.
    """
    try:
        yield
    except CoSpecError as error:
        if under_vllms_command():
            _print_sentences()
        raise error.with_traceback(None) from None


def _print_sentences() -> None:

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, CoSpecError):
            print(f"cospec: {error}", file=sys.stderr)
        else:
            usual(kind, error, trace)

    usual = compat.wrap("sys:excepthook", sys, hook)


def replace_front_end() -> None:
    """Replace what a front end with cospec needs: 400 for bad requests, counters on /metrics and in the log."""
    compat.replace("vllm.v1.engine.input_processor:InputProcessor.process_inputs", _make_process_inputs)
    for handler in hooks.HANDLERS:
        compat.replace(handler, _make_handler)
    if reports.request_metrics() is not None:
        compat.replace(hooks.OUTPUTS, reports.make_process_outputs)
    compat.replace("vllm.v1.metrics.loggers:LoggingStatLogger.log", _make_log)

    def prom(original: Any) -> Any:
        from vllm_cospec.metrics import CoSpecDecodingProm

        return CoSpecDecodingProm

    compat.replace("vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls", prom)


def _make_process_inputs(original: Any) -> Any:
    """Every request passes here on its way to the engine, over HTTP or not."""

    @functools.wraps(original)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        settings = getattr(self.speculative_config, "cospec", None)
        if settings is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        with _as_bad_request():
            check_keys(getattr(params, "extra_args", None), settings)  # pooling has none
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if request.sampling_params is not None:
                keep_strict(request, self.speculative_config)
                if check_sampling(request.sampling_params, settings):
                    logger.warning_once("CoSpec: requests sample otherwise than the arbiter was calibrated for.")
            return request

    return process_inputs


def _make_handler(original: Any) -> Any:
    """An endpoint's own method: only here are a request's keys still as they were written.

    By the time they are sampling parameters, ``true`` has become 1, and beam search has dropped them. Whether tools are
    declared is not said by them at all.
    """

    @functools.wraps(original)
    async def handle(self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        settings = getattr(self.engine_client.vllm_config.speculative_config, "cospec", None)
        if settings is not None and request.vllm_xargs:
            body = None if raw_request is None else await raw_request.json()
            with _as_bad_request():
                check_keys(request.vllm_xargs if body is None else body["vllm_xargs"], settings)
        if settings is not None and getattr(request, "tools", None) and getattr(request, "tool_choice", None) != "none":
            request.vllm_xargs = {**(request.vllm_xargs or {}), DECLARES_TOOLS: 1}
        return await original(self, request, raw_request, *args, **kwargs)

    return handle


@contextlib.contextmanager
def _as_bad_request() -> Iterator[None]:
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _make_log(original: Any) -> Any:
    @functools.wraps(original)
    def log(self: Any) -> None:
        original(self)
        from vllm_cospec.metrics import log_line

        line = log_line(self)
        if line is not None:
            logger.info(line)

    return log
