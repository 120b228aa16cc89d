"""Nothing damaged gets in: each way to damage an artefact is refused with one line that names the culprit."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import make_config, refusal
from safetensors.torch import load_file, save_file

from vllm_cospec.arbiter import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    current_schema,
    load_artefact,
    load_config,
)

# Damaged artefacts: each entry takes a sound artefact and returns the directory to load.

Damage = Callable[[Path], Path | None]
DAMAGES: dict[str, tuple[Damage, str]] = {}
"""Name -> (what is done to the directory, what the message must name)."""


def damage(name: str, names: str) -> Callable[[Damage], Damage]:
    def register(function: Damage) -> Damage:
        assert name not in DAMAGES
        DAMAGES[name] = function, names
        return function

    return register


def config_damage(name: str, names: str, **changes: Any) -> None:
    """Replace keys of config.json; a dotted name reaches into an object, and ``...`` removes the key."""

    def change(directory: Path) -> None:
        path = directory / CONFIG_FILE
        config = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            holder = config
            for parent in parents:
                holder = holder[int(parent)] if isinstance(holder, list) else holder[parent]
            if value is ...:
                del holder[last]
            else:
                holder[last] = value
        path.write_text(json.dumps(config))

    damage(name, names)(change)


def _cut(length: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:length]


def bytes_damage(name: str, file: str, change: Callable[[bytes], bytes]) -> None:
    def rewrite(directory: Path) -> None:
        path = directory / file
        path.write_bytes(change(path.read_bytes()))

    damage(name, file)(rewrite)


def tensor_damage(name: str, names: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    def rewrite(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, directory / WEIGHTS_FILE)

    damage(name, names)(rewrite)


def header_damage(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the JSON header of model.safetensors."""

    def rewrite(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    bytes_damage(name, WEIGHTS_FILE, rewrite)


# model.safetensors, as bytes
for length in (0, 1, 7, 8, 9, 100, 600, 1000, 5000):
    bytes_damage(f"weights cut to {length} bytes", WEIGHTS_FILE, _cut(length))
bytes_damage("weights without the last byte", WEIGHTS_FILE, lambda data: data[:-1])
bytes_damage("weights with a byte too many", WEIGHTS_FILE, lambda data: data + b"\0")
bytes_damage("weights of zeros", WEIGHTS_FILE, lambda data: bytes(len(data)))
bytes_damage("weights of 0xff", WEIGHTS_FILE, lambda data: b"\xff" * len(data))
bytes_damage("weights of text", WEIGHTS_FILE, lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 4)
bytes_damage("weights of noise", WEIGHTS_FILE, lambda data: bytes(i * 167 % 251 for i in range(len(data))))
bytes_damage("a header that is not UTF-8", WEIGHTS_FILE, lambda data: data[:8] + b"\xff\xfe" + data[10:])
bytes_damage("weights too large", WEIGHTS_FILE, lambda data: data + bytes(MAX_WEIGHTS_BYTES))
header_damage("a header with an unknown dtype", lambda header: header["mean"].update(dtype="XYZ"))
header_damage("a header with a dtype of lines", lambda header: header["mean"].update(dtype="Q\n" * 5000))
header_damage("a header with a negative shape", lambda header: header["mean"].update(shape=[-16]))
header_damage("a header with a huge shape", lambda header: header["mean"].update(shape=[2**62, 2**62]))
header_damage("a header with a scalar", lambda header: header["mean"].update(shape=[]))
header_damage("a header with offsets out of range", lambda header: header["mean"].update(data_offsets=[0, 2**40]))
header_damage("a header with overlapping tensors", lambda header: header["mean"].update(header["scale"]))


# model.safetensors, as tensors
def _swap(tensors: dict[str, torch.Tensor]) -> None:
    a, b = tensors["layers.0.weight"], tensors["layers.1.weight"]
    tensors["layers.0.weight"], tensors["layers.1.weight"] = b.contiguous(), a.contiguous()


def _spoil(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


tensor_damage("swapped shapes", "layers.0.weight", _swap)
tensor_damage(
    "transposed", "layers.0.weight", lambda t: t.update({"layers.0.weight": t["layers.0.weight"].T.contiguous()})
)
tensor_damage("flattened", "layers.2.weight", lambda t: t.update({"layers.2.weight": t["layers.2.weight"].view(-1)}))
tensor_damage("an extra tensor", "extra", lambda t: t.update(extra=torch.zeros(3)))
tensor_damage("an extra layer", "layers.3.bias", lambda t: t.update({"layers.3.bias": torch.zeros(1)}))
tensor_damage("an extra tensor with a long name", WEIGHTS_FILE, lambda t: t.update({"x" * 5000: torch.zeros(3)}))
tensor_damage("an extra tensor with a name of lines", WEIGHTS_FILE, lambda t: t.update({"x\ny": torch.zeros(3)}))
tensor_damage("a missing layer", "layers.1.bias", lambda t: t.pop("layers.1.bias"))
tensor_damage("a missing normalisation", "mean", lambda t: t.pop("mean"))
tensor_damage("no tensors", WEIGHTS_FILE, lambda t: t.clear())
tensor_damage("a NaN weight", "layers.1.weight", _spoil("layers.1.weight", float("nan")))
tensor_damage("an infinite weight", "layers.2.bias", _spoil("layers.2.bias", float("inf")))
tensor_damage("a NaN mean", "mean", _spoil("mean", float("nan")))
tensor_damage("a NaN scale", "scale", _spoil("scale", float("nan")))
tensor_damage("a scale of zero", "scale", _spoil("scale", 0.0))
tensor_damage("a scale of minus zero", "scale", _spoil("scale", -0.0))
tensor_damage("a negative scale", "scale", _spoil("scale", -1.0))
tensor_damage("float16 weights", "layers.0.weight", _cast("layers.0.weight", torch.float16))
tensor_damage("bfloat16 weights", "layers.1.bias", _cast("layers.1.bias", torch.bfloat16))
tensor_damage("float64 weights", "scale", _cast("scale", torch.float64))
tensor_damage("integer weights", "mean", _cast("mean", torch.int32))
tensor_damage("boolean weights", "mean", _cast("mean", torch.bool))
tensor_damage("complex weights", "mean", _cast("mean", torch.complex64))


# config.json, as bytes
bytes_damage("an empty configuration", CONFIG_FILE, lambda data: b"")
for length in (1, 40, 400, -3):  # the last cuts the closing brace
    bytes_damage(f"configuration cut to {length} bytes", CONFIG_FILE, _cut(length))
bytes_damage("a configuration of noise", CONFIG_FILE, lambda data: bytes(i * 167 % 251 for i in range(3000)))
bytes_damage("a configuration in UTF-16", CONFIG_FILE, lambda data: data.decode().encode("utf-16"))
bytes_damage("a configuration with a null byte", CONFIG_FILE, lambda data: data[:20] + b"\0" + data[20:])
bytes_damage("two configurations", CONFIG_FILE, lambda data: data + data)
bytes_damage("a list", CONFIG_FILE, lambda data: b"[" + data + b"]")
bytes_damage("a string", CONFIG_FILE, lambda data: b'"arbiter"')
bytes_damage("null", CONFIG_FILE, lambda data: b"null")
bytes_damage("an empty object", CONFIG_FILE, lambda data: b"{}")
bytes_damage("a deeply nested list", CONFIG_FILE, lambda data: b"[" * 100_000)
bytes_damage("a configuration too large", CONFIG_FILE, lambda data: data + b" " * MAX_CONFIG_BYTES)
bytes_damage(
    "a model's configuration", CONFIG_FILE, lambda data: b'{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}'
)


# config.json, as keys
config_damage("an unknown key", "treshold", treshold=0.5)
config_damage("an unknown nested key", "provenance.sha", provenance__sha="abc")
config_damage("an unknown key of many letters", CONFIG_FILE, **{"x" * 5000: 1})
config_damage("an unknown key of two lines", CONFIG_FILE, **{"x\ny": 1})
config_damage("a package of many lines", CONFIG_FILE, provenance__packages={"x\n" * 1000: 1})
config_damage("no threshold", "threshold", threshold=...)
config_damage("no schema", "schema", schema=...)
config_damage("no provenance", "provenance", provenance=...)
config_damage("no vocabulary size", "provenance.vocab_size", provenance__vocab_size=...)
config_damage("a threshold of NaN", "threshold", threshold=float("nan"))
config_damage("an infinite threshold", "threshold", threshold=float("inf"))
config_damage("a threshold above 1", "threshold", threshold=1.5)
config_damage("a threshold below 0", "threshold", threshold=-0.5)
config_damage("a threshold of words", "threshold", threshold="high\n" * 1000)
config_damage("a threshold in quotes", "threshold", threshold="0.5")
config_damage("a boolean threshold", "threshold", threshold=True)
config_damage("a threshold of null", "threshold", threshold=None)
config_damage("format version 3", "format_version", format_version=3)
config_damage("a format version in words", "format_version", format_version="one")
config_damage("another schema hash", CONFIG_FILE, schema__hash="0" * 16)
config_damage("the hash of the other variant", CONFIG_FILE, schema__hash=current_schema(False).hash)
config_damage("the other variant", CONFIG_FILE, schema__draft_logits=False)
config_damage("another schema version", CONFIG_FILE, schema__version=2)
config_damage("another schema name", CONFIG_FILE, schema__name="something else")
config_damage("a schema name of many lines", CONFIG_FILE, schema__name="x\n" * 3000)
config_damage("a schema that is a string", "schema", schema="cospec-statistics")
config_damage("a schema version in words", "schema.version", schema__version="one")
config_damage("no hidden layer", "hidden_sizes", hidden_sizes=[])
config_damage("a hidden layer of 0", "hidden_sizes", hidden_sizes=[0])
config_damage("a hidden layer of -1", "hidden_sizes", hidden_sizes=[-1, 32])
config_damage("a hidden layer of 300", "hidden_sizes", hidden_sizes=[32, 300])
config_damage("a hidden layer of a billion", "hidden_sizes", hidden_sizes=[10**9, 10**9])
config_damage("three hidden layers", "hidden_sizes", hidden_sizes=[32, 32, 32])
config_damage("half a hidden unit", "hidden_sizes", hidden_sizes=[32.5])
config_damage("hidden sizes that are a number", "hidden_sizes", hidden_sizes=32)
config_damage("other hidden sizes", WEIGHTS_FILE, hidden_sizes=[32, 31])
config_damage("one hidden layer too few", WEIGHTS_FILE, hidden_sizes=[32])
config_damage("a vocabulary of 1", "provenance.vocab_size", provenance__vocab_size=1)
config_damage("a vocabulary of words", "provenance.vocab_size", provenance__vocab_size="many")
config_damage("a huge vocabulary", "provenance.vocab_size", provenance__vocab_size=1e300)
config_damage("a tokenizer hash that is a number", "provenance.tokenizer_hash", provenance__tokenizer_hash=7)
config_damage("provenance that is a list", "provenance", provenance=[])
config_damage("a curve that is an object", "calibration", calibration={})
config_damage("a curve with NaN", "calibration.1.accuracy", calibration__1__accuracy=float("nan"))
config_damage("an interval with NaN", "ci95", calibration__0__accuracy_difference_ci95=[float("nan"), 0.1])
config_damage("an interval of three", "ci95", calibration__0__accuracy_difference_ci95=[0.1, 0.2, 0.3])
config_damage("an acceptance length below 1", "acceptance_length", calibration__0__acceptance_length=0.5)
config_damage("a point of no problems", "num_problems", calibration__0__num_problems=0)
config_damage("an unknown key in the curve", "calibration.0.speed", calibration__0__speed=3)


# The directory
@damage("nothing there", "nowhere")
def _nowhere(directory: Path) -> Path:
    return directory / "nowhere"


@damage("an empty directory", CONFIG_FILE)
def _empty(directory: Path) -> Path:
    (directory / "empty").mkdir()
    return directory / "empty"


@damage("the path of the configuration", CONFIG_FILE)
def _file_as_directory(directory: Path) -> Path:
    return directory / CONFIG_FILE


@damage("no configuration", CONFIG_FILE)
def _no_configuration(directory: Path) -> None:
    (directory / CONFIG_FILE).unlink()


@damage("no weights", WEIGHTS_FILE)
def _no_weights(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()


@damage("a configuration that is a directory", CONFIG_FILE)
def _configuration_directory(directory: Path) -> None:
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).mkdir()


@damage("weights that are a directory", WEIGHTS_FILE)
def _weights_directory(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()
    (directory / WEIGHTS_FILE).mkdir()


@damage("a configuration that is a pipe", CONFIG_FILE)
def _pipe(directory: Path) -> None:
    (directory / CONFIG_FILE).unlink()
    os.mkfifo(directory / CONFIG_FILE)  # reading it would wait for ever


@damage("weights that link to nothing", WEIGHTS_FILE)
def _dangling(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()
    (directory / WEIGHTS_FILE).symlink_to("gone")


@damage("a configuration that links to itself", CONFIG_FILE)
def _configuration_loop(directory: Path) -> None:
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).symlink_to(CONFIG_FILE)


@damage("a directory that links to itself", "loop")
def _directory_loop(directory: Path) -> Path:
    (directory / "loop").symlink_to("loop")
    return directory / "loop"


@damage("a null byte in the path", "null")
def _null_byte(directory: Path) -> Path:
    return directory / "null\0byte"


@damage("a newline in the path", "new")
def _newline(directory: Path) -> Path:
    return directory / "new\nline"


@damage("a name too long for a file", "nnn")
def _long_name(directory: Path) -> Path:
    return directory / ("n" * 256)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artefact_is_refused_with_one_line_that_names_the_culprit(artefact: Path, name: str) -> None:
    change, culprit = DAMAGES[name]
    directory = change(artefact) or artefact
    assert culprit in refusal(lambda: load_artefact(directory))


def test_enough_ways_to_damage_an_artefact_are_tried() -> None:
    assert len(DAMAGES) >= 40


class Trap:
    """Unpickled, it creates a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_pickle_is_refused_and_never_executed(artefact: Path, tmp_path: Path, file: str, protocol: int) -> None:
    sprung = tmp_path / "sprung"
    (artefact / file).write_bytes(pickle.dumps(Trap(sprung), protocol))
    assert file in refusal(lambda: load_artefact(artefact))
    assert not sprung.exists()


def test_a_torch_checkpoint_is_refused_and_never_executed(artefact: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"mean": Trap(sprung)}, artefact / WEIGHTS_FILE)
    assert WEIGHTS_FILE in refusal(lambda: load_artefact(artefact))
    assert not sprung.exists()


def test_the_configuration_can_be_read_without_the_weights(artefact: Path) -> None:
    (artefact / WEIGHTS_FILE).unlink()
    assert load_config(artefact) == make_config()


def test_a_link_to_an_artefact_is_followed(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artefact)
    assert load_artefact(tmp_path / "link")[1] == make_config()
