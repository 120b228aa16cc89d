"""The arbiter: a small network over the statistics, and the artefact it is kept in.

An artefact is a directory: ``config.json``, ``model.safetensors``, ``README.md``. It is written atomically, holds no
pickle, and is refused, with the reason, when it is damaged or was made for something else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_cospec.atomic import new_directory
from vllm_cospec.calibration import CurvePoint, Statement
from vllm_cospec.errors import ArtefactError, first_sentence
from vllm_cospec.kernels.cpu import Network
from vllm_cospec.kernels.frozen import Frozen
from vllm_cospec.kernels.statistics import INPUT_LIMIT, NUM_STATISTICS, SCHEMA_NAME, SCHEMA_VERSION, schema_hash

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES = 4 * 2**20, 16 * 2**20  # an arbiter has a few thousand weights


class SchemaId(Frozen):
    """Which statistics the arbiter was trained on."""

    name: str
    version: int
    hash: str
    draft_logits: bool
    """False: trained with a drafter that has no logits (ngram, suffix)."""


class Provenance(Frozen):
    """Where the arbiter comes from."""

    target: str = ""
    draft: str = ""
    vocab_size: int = Field(ge=2)
    tokenizer_hash: str
    """See :func:`tokenizer_hash`."""
    training_config: dict[str, Any] = Field(default_factory=dict)
    git_sha: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    created: str = ""
    results: dict[str, Any] = Field(default_factory=dict)
    """Measured results, with their sample sizes."""


class ArtefactConfig(Frozen):
    """The contents of an artefact's ``config.json``."""

    format_version: Literal[1, 2] = 2
    """1: without `statement`."""
    schema_id: SchemaId = Field(alias="schema")
    hidden_sizes: tuple[int, ...] = Field(min_length=1, max_length=2)
    """Width of each hidden layer."""
    threshold: float = Field(ge=0, le=1)
    """Keep the draft when the score exceeds it."""
    calibration: tuple[CurvePoint, ...] = ()
    """The curve, from the strictest threshold on; empty before calibration."""
    statement: Statement | None = None
    """What the curve's bounds mean and hold for; None before calibration."""
    provenance: Provenance

    @model_validator(mode="after")
    def _check(self) -> ArtefactConfig:
        if not all(1 <= size <= 256 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes must lie between 1 and 256, got {list(self.hidden_sizes)}")
        return self


class Arbiter(nn.Module):
    """Standardise, clamp, one or two hidden ReLU layers, one logit, sigmoid.

    Normalisation is part of the network: its mean and scale are saved with the weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden_sizes: tuple[int, ...] = (32, 32)):
        super().__init__()
        self.hidden_sizes = tuple(hidden_sizes)
        self.register_buffer("mean", torch.zeros(NUM_STATISTICS))
        self.register_buffer("scale", torch.ones(NUM_STATISTICS))
        sizes = [NUM_STATISTICS, *hidden_sizes, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def logit(self, statistics: Tensor) -> Tensor:
        """Map statistics, float32 [M, 16], to logits, float32 [M]."""
        x = ((statistics - self.mean) / self.scale).clamp(-INPUT_LIMIT, INPUT_LIMIT)
        *hidden, last = self.layers  # a slice would be a module of its own, which takes longer than the network
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x).squeeze(-1)

    def forward(self, statistics: Tensor) -> Tensor:
        """Map statistics, float32 [M, 16], to scores in (0, 1), float32 [M]."""
        return torch.sigmoid(self.logit(statistics))

    def network(self) -> Network:
        """Return a copy of it for :mod:`vllm_cospec.kernels.cpu`, with the same scores but for the last bits."""
        return Network(
            self.mean, self.scale, [(layer.weight, layer.bias) for layer in self.layers if isinstance(layer, nn.Linear)]
        )


def tokenizer_hash(vocabulary: dict[str, int]) -> str:
    """Return 16 hex digits over a tokenizer's vocabulary, whatever file it came from."""
    text = json.dumps(sorted(vocabulary.items()), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def current_schema(draft_logits: bool) -> SchemaId:
    """Return the schema this version of the package computes."""
    return SchemaId(name=SCHEMA_NAME, version=SCHEMA_VERSION, hash=schema_hash(draft_logits), draft_logits=draft_logits)


def save_artefact(directory: Path, arbiter: Arbiter, config: ArtefactConfig, card: str) -> None:
    """Write an artefact; a reader sees the old one or the new one, never a part.

    Raises:
        ArtefactError: weights are not finite, or ``directory`` exists and is no artefact.
    """
    if config.hidden_sizes != arbiter.hidden_sizes:
        raise ArtefactError(f"hidden_sizes: config says {config.hidden_sizes}, the network has {arbiter.hidden_sizes}")
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in arbiter.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtefactError(f"{name}: not finite; training has diverged, so nothing was saved")
    if not (tensors["scale"] > 0).all():
        raise ArtefactError("scale: not positive; a statistic without deviation needs a scale of 1")
    if not _may_replace(directory):
        raise ArtefactError(f"{directory}: exists and is not an arbiter; choose another directory")
    with new_directory(directory) as partial:
        save_file(tensors, partial / WEIGHTS_FILE)
        (partial / CONFIG_FILE).write_text(config.model_dump_json(by_alias=True, indent=2) + "\n")
        (partial / CARD_FILE).write_text(card)


def _may_replace(directory: Path) -> bool:
    """Whether saving there destroys nothing but an arbiter."""
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    try:
        found = json.loads((directory / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"format_version", "schema", "hidden_sizes"} <= found.keys()


def load_config(directory: Path) -> ArtefactConfig:
    """Read and check ``config.json`` of an artefact; the weights are not read.

    Raises:
        ArtefactError: names the file and the reason.
    """
    path = directory / CONFIG_FILE
    try:
        if not path.is_file():
            raise ArtefactError(
                f"{directory}: no arbiter here ({CONFIG_FILE} is missing); pass an artefact's directory"
            )
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ArtefactError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is not an arbiter's configuration")
        config = ArtefactConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtefactError(first_sentence(error, str(path))) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{directory}: cannot be read ({error}); pass an artefact's directory") from None
    ours = current_schema(config.schema_id.draft_logits)
    if config.schema_id != ours:
        raise ArtefactError(
            f"{path}: made for schema {config.schema_id.name} v{config.schema_id.version} ({config.schema_id.hash}), "
            f"this version computes {ours.name} v{ours.version} ({ours.hash}); retrain or install the matching version"
        )
    return config


def load_artefact(directory: Path) -> tuple[Arbiter, ArtefactConfig]:
    """Read and check an artefact.

    Returns:
        The network, in evaluation mode without gradients, and its configuration.

    Raises:
        ArtefactError: missing, truncated, altered or mismatched; names the file and the reason.
    """
    config = load_config(directory)
    arbiter = Arbiter(config.hidden_sizes)
    expected = {name: tuple(tensor.shape) for name, tensor in arbiter.state_dict().items()}
    path = directory / WEIGHTS_FILE
    try:
        if not path.is_file():
            raise ArtefactError(f"{path}: missing; copy the whole artefact")
        if path.stat().st_size > MAX_WEIGHTS_BYTES:
            raise ArtefactError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes; these are not an arbiter's weights")
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
                raise ArtefactError(
                    f"{path}: tensor {wrong[0]!r} has shape {found.get(wrong[0])}, "
                    f"config.json calls for {expected.get(wrong[0])}; copy the whole artefact"
                )
            weights = {name: file.get_tensor(name) for name in found}
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); it is damaged, copy it again") from None
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ArtefactError(f"{path}: tensor {name!r} is not finite float32; it is damaged, copy it again")
    if not (weights["scale"] > 0).all():
        raise ArtefactError(f"{path}: tensor 'scale' is not positive; it is damaged, copy it again")
    arbiter.load_state_dict(weights)
    return arbiter.eval().requires_grad_(False), config


def check_fit(config: ArtefactConfig, where: str, draft_logits: bool, tokenizer: str) -> None:
    """Refuse an artefact trained for another drafter variant or tokenizer.

    The sizes of the vocabularies are not compared: models pad them, and padding means nothing.

    Args:
        config: of the artefact.
        where: its path, for the message.
        draft_logits: whether the drafter in use has logits.
        tokenizer: :func:`tokenizer_hash` of the target in use.

    Raises:
        ArtefactError: says what differs.
    """
    made = config.provenance
    if config.schema_id.draft_logits != draft_logits:
        with_or_without = "with" if config.schema_id.draft_logits else "without"
        raise ArtefactError(
            f"arbiter: {where} was trained {with_or_without} draft logits, this drafter has "
            f"{'them' if draft_logits else 'none'}; use an arbiter trained for this kind of drafter"
        )
    if made.tokenizer_hash != tokenizer:
        raise ArtefactError(
            f"arbiter: {where} was trained with tokenizer {made.tokenizer_hash}, the target has {tokenizer}; "
            f"use an arbiter trained for this target"
        )
