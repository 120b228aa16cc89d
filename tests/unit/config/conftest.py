"""A pair of tiny models with an arbiter, and no network."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from configurations import Pair, conditions, write_artefact, write_model
from vllm.transformers_utils import repo_utils

from vllm_cospec.metrics import DIRECTORY_VARIABLE


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    draft = write_model(root / "draft")
    return Pair(
        write_model(root / "target"),
        draft,
        write_model(root / "other", extra_tokens=8),
        write_artefact(root / "arbiter", calibrated_for=conditions(draft)),
    )


@pytest.fixture(autouse=True)
def _offline_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(repo_utils, "time", SimpleNamespace(sleep=lambda seconds: None))  # vLLM retries bad files
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")  # recorded by monkeypatch, so it is taken back
    monkeypatch.delenv(DIRECTORY_VARIABLE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
