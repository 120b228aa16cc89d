"""What an arbiter's artefact says about the pair it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_cospec.arbiter import ArtefactConfig, Provenance, current_schema, tokenizer_hash
from vllm_cospec.config import DRAFT_METHODS
from vllm_cospec.training.config import PairConfig, TrainConfig
from vllm_cospec.training.prompts import target_config, target_tokenizer


def artefact_config(pair: PairConfig, hidden_sizes: tuple[int, ...], **provenance: Any) -> ArtefactConfig:
    """Describe an arbiter of this shape that fits the pair, with a threshold of 0.5 and no curve."""
    made = Provenance(
        target=short_name(pair.target),
        draft=short_name(pair.draft or pair.draft_method or ""),
        vocab_size=target_config(pair).vocab_size,
        tokenizer_hash=tokenizer_hash(target_tokenizer(pair).get_vocab()),
        **provenance,
    )
    schema = current_schema(draft_logits=DRAFT_METHODS.get(pair.draft_method or "", True))
    return ArtefactConfig(schema=schema, hidden_sizes=hidden_sizes, threshold=0.5, provenance=made)


def portable(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as JSON keeps it, with models by name, not by where they lay on this machine."""
    dumped = json.loads(config.model_dump_json())
    for role in ("target", "draft"):
        if dumped["pair"][role]:
            dumped["pair"][role] = short_name(dumped["pair"][role])
    return dumped


def short_name(reference: str) -> str:
    """A hub id as it is, a path by its last two parts: where it lay on one machine says nothing on another."""
    path = Path(reference)
    return "/".join(path.parts[-2:]) if path.is_absolute() else reference
