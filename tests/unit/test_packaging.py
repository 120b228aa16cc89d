"""A built wheel holds everything: the entry points, both renamed packages and the bundled pair."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(directory),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    return next(directory.glob("*.whl"))


def test_the_wheel_is_complete(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "vllm_cospec/plugin.py",
        "vllm_cospec/kernels/cpu.py",
        "vllm_cospec/kernels/triton/launch.py",
        "vllm_cospec/training/tasks/__init__.py",
        "vllm_cospec/demo/target/model.safetensors",
        "vllm_cospec/demo/target/cospec.json",
        "vllm_cospec/demo/draft/model.safetensors",
        "vllm_cospec/demo/arbiter/model.safetensors",
        "vllm_cospec/training/configs/demo.toml",
        "vllm_cospec/py.typed",
    ):
        assert name in names
    assert not any(name.startswith(("kernels/", "training/", "tests/", "benchmarks/")) for name in names)


def test_others_may_read_what_a_wheel_installs_as_the_umask_says(wheel: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {info.filename: info.external_attr >> 16 & 0o444 for info in zipfile.ZipFile(wheel).infolist()}
    assert {name for name, readable in modes.items() if readable != 0o444 & ~umask} == set()


def test_an_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder and imported with nothing of the checkout on the path."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)], check=True
    )
    program = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, {str(site)!r})
import vllm_cospec, vllm_cospec.kernels.cpu, vllm_cospec.training.tasks
assert vllm_cospec.__file__.startswith({str(site)!r}), vllm_cospec.__file__
from importlib.metadata import distributions
found = next(d for d in distributions(path=[{str(site)!r}]) if d.name == "vllm-cospec")
points = {{(p.group, p.name): p.load() for p in found.entry_points}}
points[("vllm.general_plugins", "cospec")]()
assert ("console_scripts", "cospec") in points
from vllm.engine.arg_utils import EngineArgs
from vllm_cospec.compat import MARK
assert hasattr(EngineArgs.create_speculative_config, MARK)
from transformers import AutoTokenizer
from importlib.resources import files
assert len(AutoTokenizer.from_pretrained(str(files("vllm_cospec.demo") / "target"))) == 100
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def python(program: str, cwd: Path, path: Path | None = None) -> str:
    """Run a program with ``cwd`` first on the path, as ``python -m`` has it; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution named kernels, which transformers imports when it is there."""
    site = tmp_path_factory.mktemp("site")
    for path, text in {
        "kernels/__init__.py": "from kernels.layer import Layer\ndef __getattr__(name): return type(name, (), {})\n",
        "kernels/layer.py": "class Layer: ...\n",
        "kernels-0.17.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n",
    }.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(text)
    return site


def test_from_the_checkouts_root_the_library_named_kernels_is_found(library: Path) -> None:
    program = """
import kernels, kernels.layer, sys
from transformers.integrations import hub_kernels
assert kernels.Layer is kernels.layer.Layer and sys.modules["kernels"] is kernels
import vllm_cospec.kernels.statistics as ours
print(kernels.__file__, ours.__file__, hub_kernels.is_kernels_available())
"""
    expected = f"{library}/kernels/__init__.py {ROOT}/kernels/statistics.py True"
    assert python(program, ROOT, library) == expected


@pytest.mark.skipif("kernels" in importlib.metadata.packages_distributions(), reason="that library is installed")
def test_without_that_library_transformers_sees_none_and_starts(tmp_path: Path) -> None:
    program = "from transformers.integrations import hub_kernels as h; print(h.is_kernels_available())"
    for cwd in (ROOT, tmp_path):
        assert python(program, cwd) == "False"
