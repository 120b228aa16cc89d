"""Lays the Python code of another vLLM version over the installed CPU build, so that it runs here. For tests only.

That version's wheel is for GPUs; its Python files go into a folder, the CPU build's compiled modules beside them.

    python tests/compat/build_overlay.py 0.33.0 .compat
    PYTHONPATH=.compat/0.33.0 python -c 'import vllm; print(vllm.__version__)'
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MORE = ("orjson==3.13.0",)  # what that version imports and the CPU build's does not
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"


def build(version: str, directory: Path) -> Path:
    """Return the folder for PYTHONPATH, building it where it is not there yet."""
    overlay = directory / version
    if overlay.exists():
        return overlay
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "the CPU build of vLLM is not installed; run make venv"
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, f"vllm=={version}"],
            check=True,
        )
        partial = Path(scratch) / "overlay"
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith("vllm/") and not name.endswith((".so", ".cubin", "/")):
                    wheel.extract(name, partial)
        for library in installed.rglob("*.so"):
            to = partial / "vllm" / library.relative_to(installed)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, to)
        install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(partial), *MORE]
        subprocess.run(install, check=True)
        metadata = partial / f"vllm-{version}+cpu.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(METADATA.format(version=version))
        partial.rename(overlay)
    return overlay


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2])))
