"""A sound artefact."""

from pathlib import Path

import pytest
from artefacts import make_arbiter, make_config

from vllm_cospec.arbiter import save_artefact


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    """A sound artefact."""
    directory = tmp_path / "arbiter"
    save_artefact(directory, make_arbiter(), make_config(), "# Card\n")
    return directory
