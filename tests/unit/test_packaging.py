"""A built wheel holds everything: the entry points, both renamed packages and the bundled pair."""

from __future__ import annotations

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


def test_no_top_level_package_shadows_the_kernels_library() -> None:
    """transformers imports a package named `kernels`; ours must not answer to that name."""
    program = "import importlib.util as u; s = u.find_spec('kernels'); assert s is None or 'site-packages' in s.origin"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, check=True)
