"""The entry point vLLM calls in every process, and the translation of ``{"method": "cospec"}``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_cospec import compat
from vllm_cospec.config import WHERE, Settings, asked_for, resolve, settle
from vllm_cospec.errors import CompatibilityError, ConfigError, CoSpecError

logger = init_logger("vllm.cospec")

_announced: set[str] = set()


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
    compat.replace(target, _make_create_speculative_config)


def _make_create_speculative_config(original: Any) -> Any:
    @functools.wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        method = getattr(self, "spec_method", None)
        raw = self.speculative_config
        if not asked_for(raw) and method != "cospec":
            return original(self, target_model_config, target_parallel_config)
        raw = _merge_short_flags(self, raw or {})
        try:
            return _translate(original, self, raw, target_model_config, target_parallel_config)
        except CoSpecError as error:
            _let_it_stand_alone()
            raise error.with_traceback(None) from None  # the sentence is all a user needs

    return create_speculative_config


def _let_it_stand_alone() -> None:
    """Where vLLM's own command runs, end it with the sentence alone: fifty lines of its frames show no way out.

    A program that builds an LLM keeps its traceback, which leads to the line that has to change.
    """
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if Path(sys.argv[0]).name != "vllm" and not (spec and spec.name.startswith("vllm.")):
        return
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, CoSpecError):
            print(f"cospec: {error}", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = hook


def _merge_short_flags(engine_args: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the configuration with --spec-method, --spec-model and --spec-tokens in it."""
    merged = dict(raw)
    for attribute, key in (
        ("spec_method", "method"),
        ("spec_model", "model"),
        ("spec_tokens", "num_speculative_tokens"),
    ):
        value = getattr(engine_args, attribute, None)
        if value is None:
            continue
        if key in merged:
            flag = attribute.replace("_", "-")
            raise ConfigError(f"{WHERE}.{key}: given twice, here and as --{flag}; leave one out")
        merged[key] = value
    return merged


def _translate(
    original: Any, engine_args: Any, raw: dict[str, Any], target_model_config: Any, target_parallel_config: Any
) -> Any:
    """Build vLLM's SpeculativeConfig for the inner drafter, with our settings riding on it."""
    from vllm.config.speculative import SpeculativeConfig

    worker = _worker_class(target_parallel_config)
    engine_keys = frozenset(field.name for field in dataclasses.fields(SpeculativeConfig)) - {
        "method", "target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config",
    }  # fmt: skip
    config, inner = resolve(raw, target_model_config.model, engine_keys)
    if inner.get("parallel_drafting"):
        raise ConfigError(f"{WHERE}.parallel_drafting: cannot be combined with cospec; leave it out")
    if config.draft_method not in ("ngram", "suffix"):
        inner.setdefault("draft_sample_method", "probabilistic")  # sampled requests verify against q, as in the paper

    stand_in = copy.copy(engine_args)  # the user's arguments are read again by other API servers: never change them
    stand_in.speculative_config = inner
    for name in ("spec_method", "spec_model", "spec_tokens"):
        if hasattr(stand_in, name):
            setattr(stand_in, name, None)
    try:
        speculative_config = original(stand_in, target_model_config, target_parallel_config)
    except Exception as error:  # pydantic, transformers and the hub client all raise their own types here
        raise ConfigError(f"{WHERE}: vLLM refused the drafter {inner.get('model')!r}: {_reason(error)}") from None
    settings = _settle(config, speculative_config, target_model_config)
    _install(settings)
    speculative_config.cospec = settings
    target_parallel_config.worker_cls = worker
    _announce(settings)
    return speculative_config


def _reason(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ").removeprefix(
            "Value error, "
        )
    return " ".join(str(error).split())[:300] or type(error).__name__


def _worker_class(parallel_config: Any) -> str:
    """Return the worker to run, after checking that arbitration can run there at all.

    Raises:
        CompatibilityError: a hook is missing, or the platform or runner is not supported.
    """
    place = compat.placement()
    if place.problem is not None:
        raise CompatibilityError(place.problem)
    if parallel_config.worker_cls not in ("auto", place.worker):
        raise CompatibilityError(
            f"worker_cls: {parallel_config.worker_cls!r} cannot be combined with cospec, which brings its own worker; "
            f"leave it out"
        )
    if parallel_config.pipeline_parallel_size > 1:
        raise CompatibilityError(
            f"pipeline_parallel_size: {parallel_config.pipeline_parallel_size} is not supported with cospec; use 1"
        )
    compat.require_hooks(place.scopes)
    if not compat.version_supported(compat.vllm_version()):
        logger.warning("cospec was not tested with vLLM %s; every hook it needs is there.", compat.vllm_version())
    return place.worker


def _settle(config: Any, speculative_config: Any, target_model_config: Any) -> Settings:
    from vllm_cospec.metrics import counters_directory

    def vocabulary() -> dict[str, int]:
        from vllm.tokenizers.registry import get_tokenizer

        return get_tokenizer(
            target_model_config.tokenizer,
            tokenizer_mode=target_model_config.tokenizer_mode,
            trust_remote_code=target_model_config.trust_remote_code,
            revision=target_model_config.tokenizer_revision,
        ).get_vocab()

    if speculative_config.parallel_drafting:
        raise ConfigError(f"{WHERE}.model: drafts in parallel, which cospec does not support; use another drafter")
    return settle(
        config,
        method=speculative_config.method,
        num_speculative_tokens=speculative_config.num_speculative_tokens,
        target_vocab_size=target_model_config.get_vocab_size(),
        draft_vocab_size=speculative_config.draft_model_config.get_vocab_size()
        if speculative_config.method == "draft_model"
        else 0,
        target_vocabulary=vocabulary,
        counters=counters_directory(),
    )


def _announce(settings: Settings) -> None:
    line = settings.announcement()
    if line not in _announced:
        _announced.add(line)
        (logger.warning if settings.lossy else logger.info)(line)


def _install(settings: Settings) -> None:
    """Replace what only a server with cospec needs; see the ledger in compat.py."""
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
