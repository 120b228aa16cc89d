"""The document of the settings is what the models that check them say."""

from __future__ import annotations

from pathlib import Path

from vllm_cospec.config import OWN_KEYS
from vllm_cospec.requests import RequestKeys
from vllm_cospec.tables import settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def rows() -> dict[str, list[str]]:
    lines = [line.replace("\\|", "/") for line in settings().splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in reversed(lines)}


def test_the_committed_document_is_the_generated_one() -> None:
    assert DOCUMENT.read_text() == settings()


def test_every_key_of_server_and_request_is_there_with_a_meaning() -> None:
    found = rows()
    assert found.keys() >= OWN_KEYS | RequestKeys.model_fields.keys()
    assert all(found[key][2] for key in OWN_KEYS | RequestKeys.model_fields.keys())


def test_values_and_defaults_are_those_that_are_checked() -> None:
    found = rows()
    assert found["arbiter"][:2] == ["string or object", "-"]
    assert found["max_accuracy_loss"][0] == "number, above 0 to 1"
    assert found["scope"][:2] == ["`all`, `thinking`, `answer`", "`all`"]
    assert found["collect"][:2] == ["`true`, `false`", "`false`"]
    assert found["thinking_tokens"][0] == "2 times integer"
    assert found["max_overrides"][0] == "integer, from 0"
    assert found["schema"][1] == "required"
