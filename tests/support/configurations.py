"""What the tests of configurations share: small models, an arbiter, and what a refusal has to look like."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from artefacts import statement
from vllm.engine.arg_utils import EngineArgs

from vllm_cospec import plugin
from vllm_cospec.arbiter import (
    Arbiter,
    ArtefactConfig,
    Provenance,
    current_schema,
    save_artefact,
    tokenizer_hash,
)
from vllm_cospec.calibration import Conditions, CurvePoint
from vllm_cospec.config import Settings
from vllm_cospec.errors import CoSpecError
from vllm_cospec.fingerprint import template_hash, weights_hash
from vllm_cospec.kernels.policies import Learned, policy_names
from vllm_cospec.training.pairs.demo import PLANS, build_model, build_tokenizer
from vllm_cospec.translate import resolve

NAN, INF = float("nan"), float("inf")
LEFT_OUT = object()
ENGINE_KEYS = frozenset({"model", "num_speculative_tokens", "draft_tensor_parallel_size", "max_model_len"})
PARAMETERS: dict[str, dict[str, float]] = {name: {} for name in policy_names()} | {
    "cascade": {"alpha": 0.1},
    "kl": {"max_kl": 1.0},
    "random": {"rate": 0.2},
    "ears": {"tolerance": 0.5},
    "mixture": {"weight": 0.7},
    "fsd": {"max_divergence": 0.3},
}
CURVE = tuple(
    CurvePoint(
        threshold=threshold,
        accuracy=0.5,
        accuracy_difference=difference,
        accuracy_difference_ci95=(difference - 0.02, difference + 0.02),
        loss_bound=bound,
        acceptance_length=length,
        override_rate=0.5,
        num_problems=100,
    )
    for threshold, difference, bound, length in (
        (1.0, 0.0, 0.0, 2.0),
        (0.8, 0.01, 0.01, 2.5),
        (0.6, -0.01, 0.03, 3.0),
        (0.3, -0.10, 0.12, 4.0),
    )
)

plugin.register()


@dataclasses.dataclass(frozen=True)
class Pair:
    """Directories of a target, a draft that fits it, a draft with another vocabulary and an arbiter that fits."""

    target: Path
    draft: Path
    other_draft: Path
    artefact: Path


def write_model(directory: Path, extra_tokens: int = 0) -> Path:
    tokenizer = build_tokenizer()
    shape = dataclasses.replace(PLANS["draft"], hidden_size=16, intermediate_size=32, num_layers=1, num_heads=1)
    build_model(shape, len(tokenizer) + extra_tokens).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def conditions(draft: Path | None = None, **changes: Any) -> Conditions:
    """What the pair is calibrated for; with the hash of a draft's weights."""
    found: dict[str, Any] = {
        "draft": weights_hash(None if draft is None else str(draft)), "num_speculative_tokens": 3, "dtype": "float32",
        "chat_template": template_hash(build_tokenizer().chat_template), "temperature": (0.0, 0.0), "top_p": (1.0, 1.0),
    }  # fmt: skip
    return Conditions(**found | changes)


def write_artefact(
    directory: Path,
    *,
    draft_logits: bool = True,
    calibration: tuple[CurvePoint, ...] = CURVE,
    calibrated_for: Conditions | None = None,
    **provenance: Any,
) -> Path:
    vocabulary = build_tokenizer().get_vocab()
    provenance = {"vocab_size": len(vocabulary), "tokenizer_hash": tokenizer_hash(vocabulary), **provenance}
    config = ArtefactConfig(
        schema=current_schema(draft_logits),
        hidden_sizes=(8,),
        threshold=0.7,
        calibration=calibration,
        statement=None if calibrated_for is None else statement(calibrated_for),
        provenance=Provenance(**provenance),
    )
    save_artefact(directory, Arbiter((8,)), config, "# An arbiter for tests\n")
    return directory


def user_config(pair: Pair, changes: dict[Any, Any] | None = None, **more: Any) -> dict[Any, Any]:
    """Return a configuration that works, with changes; LEFT_OUT leaves a key out."""
    config = {
        "method": "cospec",
        "model": str(pair.draft),
        "num_speculative_tokens": 3,
        "arbiter": {"policy": "typical"},
    }
    config |= (changes or {}) | more
    return {key: value for key, value in config.items() if value is not LEFT_OUT}


def engine_args(target: Path, speculative_config: dict[Any, Any], **engine: Any) -> Any:
    engine = {"max_model_len": 64, "enforce_eager": True} | engine
    return EngineArgs(model=str(target), speculative_config=speculative_config, **engine)


def build(target: Path, speculative_config: dict[Any, Any], **engine: Any) -> Any:
    """Take the way of ``LLM(...)`` and ``vllm serve`` up to the point where an engine would be started."""
    return engine_args(target, speculative_config, **engine).create_engine_config()


def settings_of(pair: Pair, **changes: Any) -> Settings:
    return build(pair.target, user_config(pair, **changes)).speculative_config.cospec


def without_counters(settings: Settings) -> Settings:
    return dataclasses.replace(settings, counters="")


def assert_one_sentence(error: Any, *names: str) -> None:
    """The error is for a user: one line, not long, nothing of vLLM's or pydantic's, and it names one of ``names``."""
    message = str(error)
    assert message.isprintable(), f"not one line: {message!r}"
    assert len(message) < 600
    for inside in ("Traceback", "validation error", "pydantic", "ArgsKwargs", "object has no attribute"):
        assert inside not in message
    assert any(name in message for name in names), f"{message!r} names none of {names}"
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


def refused(target: Path, speculative_config: dict[Any, Any], *names: str, **engine: Any) -> Any:
    before = list(speculative_config.items())
    with pytest.raises(CoSpecError) as caught:
        build(target, speculative_config, **engine)
    assert_one_sentence(caught.value, *names)
    after = list(speculative_config.items())
    assert len(after) == len(before)
    assert all(a is c and b is d for (a, b), (c, d) in zip(before, after, strict=True))
    return caught.value


def learned(path: Path) -> Learned:
    return Learned(artefact=str(path))


def resolved(target: str = "target", **raw: Any) -> tuple[Any, ...]:
    raw = {"method": "cospec", "model": "org/draft", "num_speculative_tokens": 3} | raw
    return resolve({k: v for k, v in raw.items() if v is not LEFT_OUT}, str(target), ENGINE_KEYS)


def write_recipe(directory: Path, content: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "cospec.json").write_bytes(text)
    return directory


def symlink_loop(place: Path) -> Path:
    (place / "loop").symlink_to(place / "loop")
    return place / "loop"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))
