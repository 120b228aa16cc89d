"""Two things have the same fingerprint when they are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cospec.fingerprint import SAMPLE, SAMPLES, digest, template_hash, weights_hash


def model(directory: Path, content: bytes, name: str = "model.safetensors") -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    (directory / "config.json").write_text("{}")
    return str(directory)


def test_copies_have_the_same_hash_and_nothing_but_the_weights_counts(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", b"weights"), model(tmp_path / "two", b"weights")
    (tmp_path / "two" / "config.json").write_text('{"other": 1}')
    assert weights_hash(one) == weights_hash(two) != ""
    assert len(weights_hash(one)) == 16


@pytest.mark.parametrize("where", [0, 1, 0.37])
def test_weights_that_differ_in_any_sampled_place_have_another_hash(tmp_path: Path, where: float) -> None:
    size = 4 * SAMPLE * SAMPLES
    content = bytearray(size)
    place = min(size - 1, int(round(where * (SAMPLES - 1)) / (SAMPLES - 1) * (size - SAMPLE)) + SAMPLE - 1)
    content[place] = 1
    assert weights_hash(model(tmp_path / "a", bytes(size))) != weights_hash(model(tmp_path / "b", bytes(content)))


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    hashes = {weights_hash(model(tmp_path / str(i), bytes(20)[:i] + b"x" + bytes(20)[i:])) for i in range(20)}
    assert len(hashes) == 20


def test_name_size_and_order_of_files_count(tmp_path: Path) -> None:
    other_name = model(tmp_path / "a", b"w", name="other.safetensors")
    longer, both = model(tmp_path / "b", b"w\0"), model(tmp_path / "c", b"w")
    model(tmp_path / "c", b"v", name="second.safetensors")
    assert len({weights_hash(found) for found in (other_name, longer, both, model(tmp_path / "d", b"w"))}) == 4


def test_where_there_are_no_weights_the_hash_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for nothing in (None, str(tmp_path / "empty"), str(tmp_path / "nowhere"), "no-one/has-this", "\0"):
        assert weights_hash(nothing) == ""
    assert weights_hash(model(tmp_path / "hollow", b"")) != ""


def test_a_chat_template_is_text_or_texts_by_name() -> None:
    assert template_hash(None) == template_hash("") == template_hash({}) == ""
    assert len({template_hash(t) for t in ("{{ a }}", "{{ b }}", {"default": "{{ a }}"})}) == 3


def test_a_digest_tells_where_one_part_ends() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest(b"ab", b"c") != digest(b"a", b"bc")
