"""A speculators checkpoint as the model: a drafter that names its target, and vLLM takes both from it."""

import json
from pathlib import Path
from typing import Any

import pytest
from configurations import Pair, build, refused

from vllm_cospec.config import METHOD
from vllm_cospec.kernels.policies import Typical


def write_checkpoint(directory: Any, pair: Pair, kind: str = "eagle3", **changes: Any) -> Any:
    """Write the configuration of a drafter for the pair's target, as the speculators library does."""
    target = json.loads((pair.target / "config.json").read_text())
    shape = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    layer = {"model_type": "llama", "num_hidden_layers": 1, "max_position_embeddings": 64}
    layer |= {key: target[key] for key in shape}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": kind,
        "draft_vocab_size": target["vocab_size"],
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": str(pair.target)},
        },
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.fixture
def checkpoint(pair: Pair, tmp_path: Path) -> Any:
    return write_checkpoint(tmp_path / "checkpoint", pair)


RULE = {"arbiter": {"policy": "typical"}}


@pytest.mark.parametrize("own", [{}, {"draft_method": "eagle3"}, {"draft-method": "eagle3"}])
def test_it_is_arbitrated_with_the_drafter_it_holds(pair: Pair, checkpoint: Path, own: Any) -> None:
    config = build(checkpoint, {"method": "cospec", **RULE, **own})
    speculative = config.speculative_config
    assert config.model_config.model == str(pair.target)
    assert speculative.method == "eagle3"
    assert speculative.draft_model_config.model == str(checkpoint)
    assert (speculative.cospec.policy, speculative.cospec.num_speculative_tokens) == (Typical(), 4)
    assert config.parallel_config.worker_cls == "vllm_cospec.workers.cpu.CoSpecCPUWorker"


def test_the_users_keys_win_over_the_checkpoints(checkpoint: Path) -> None:
    speculative = build(checkpoint, {"method": "cospec", **RULE, "num_speculative_tokens": 2}).speculative_config
    assert (speculative.num_speculative_tokens, speculative.cospec.num_speculative_tokens) == (2, 2)


def test_without_an_arbiter_it_is_refused_and_not_served_strictly(checkpoint: Path) -> None:
    refused(checkpoint, {"method": "cospec"}, "speculative_config.arbiter: missing")


def test_another_drafter_than_it_holds_is_refused(checkpoint: Path) -> None:
    refused(checkpoint, {"method": "cospec", **RULE, "draft_method": "ngram"}, "draft_method: 'ngram', and the drafter")


def test_a_head_that_drafts_in_parallel_on_v1_is_refused(pair: Pair, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "other", pair, "peagle", mask_token_id=3)
    error = refused(directory, {"method": "cospec", **RULE}, "is a speculators checkpoint whose drafter")
    assert "drafting in parallel" in str(error)


def test_one_that_v2_runs_is_refused_where_v1_would_run_it(pair: Pair, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "other", pair, "dflash", mask_token_id=3, aux_hidden_state_layer_ids=[1])
    refused(directory, {"method": "cospec", **RULE}, "'dflash' drafts in parallel, and on Model Runner V1")


def test_the_short_flag_beside_it_is_refused(checkpoint: Path) -> None:
    refused(checkpoint, dict(RULE), "--spec-method", spec_method=METHOD)


def test_without_cospec_it_is_served_as_ever(checkpoint: Path) -> None:
    configs: list[Any] = [None, {"num_speculative_tokens": 2}]
    for speculative_config in configs:
        speculative = build(checkpoint, speculative_config).speculative_config
        assert speculative.method == "eagle3"
        assert not hasattr(speculative, "cospec")
