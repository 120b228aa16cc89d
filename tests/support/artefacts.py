"""Sound artefacts for tests, and what the refusal of one that is not has to look like."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_cospec.arbiter import Arbiter, ArtefactConfig, Provenance, current_schema, tokenizer_hash
from vllm_cospec.calibration import Conditions, CurvePoint, Statement
from vllm_cospec.errors import ArtefactError
from vllm_cospec.kernels.statistics import NUM_STATISTICS

VOCABULARY = {"a": 0, "b": 1, "<eos>": 2}


CONDITIONS = Conditions(
    draft="0123456789abcdef", num_speculative_tokens=7, dtype="float32", chat_template="fedcba9876543210",
    temperature=(0.0, 0.0), top_p=(1.0, 1.0),
)  # fmt: skip


def point(threshold: float, bound: float | None, length: float, **changes: Any) -> CurvePoint:
    """A point of the curve whose loss is below ``bound``."""
    fields = {
        "threshold": threshold,
        "accuracy": 0.5,
        "accuracy_difference": 0.01,
        "accuracy_difference_ci95": (-0.01, 0.03),
        "loss_bound": bound,
        "acceptance_length": length,
        "override_rate": 0.5,
        "num_problems": 200,
    }
    return CurvePoint(**{**fields, **changes})


def statement(conditions: Conditions) -> Statement:
    return Statement(
        level=0.95, test="exact", max_accuracy_loss=0.01, speed_weight=0.05, task="demo", task_hash="00ff",
        conditions=conditions,
    )  # fmt: skip


def make_config(hidden_sizes: tuple[int, ...] = (32, 32), draft_logits: bool = True, **changes: Any) -> ArtefactConfig:
    fields = {
        "schema": current_schema(draft_logits),
        "hidden_sizes": hidden_sizes,
        "threshold": 0.625,
        "calibration": (point(1.0, 0.0, 1.5), point(0.9, 0.001, 2.0), point(0.5, 0.02, 3.0)),
        "statement": statement(CONDITIONS),
        "provenance": Provenance(
            target="some/target",
            draft="some/draft",
            vocab_size=111,
            tokenizer_hash=tokenizer_hash(VOCABULARY),
            training_config={"seed": 1, "nested": {"list": [1, 2.5, None]}},
            packages={"torch": "2.13"},
            results={"accuracy": 0.75},
        ),
    }
    return ArtefactConfig(**{**fields, **changes})


def make_arbiter(hidden_sizes: tuple[int, ...] = (32, 32), seed: int = 0) -> Arbiter:
    generator = torch.Generator().manual_seed(seed)
    arbiter = Arbiter(hidden_sizes)
    with torch.no_grad():
        for tensor in arbiter.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        arbiter.scale.abs_().add_(0.1)
    return arbiter


def some_statistics() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(200, NUM_STATISTICS, generator=generator) * torch.tensor([100.0] * 8 + [1.0] * 8)


def refusal(action: Callable[[], Any]) -> str:
    """Return the message an action is refused with, which must be one sentence fit for a log line."""
    with pytest.raises(ArtefactError) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is ArtefactError
    assert message.splitlines() == [message], "not one line"
    assert len(message) < 500
    return message
