"""The hook table and the ledger of patches, against the vLLM that is installed and against ones that were changed."""

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_cospec import compat, plugin
from vllm_cospec.compat import MARK, check_hook, find, replace, require_hooks, wrap
from vllm_cospec.errors import CompatibilityError
from vllm_cospec.hooks import HOOKS, Hook
from vllm_cospec.ledger import PATCHES, Patch
from vllm_cospec.workers.cpu import EXPAND_KERNEL

SCOPES: tuple[Any, ...] = ("config", "v1", "v2", "cpu", "gpu")
FLAG = "vllm.engine.arg_utils:EngineArgs.create_speculative_config"
ALL_HOOKS = pytest.mark.parametrize("hook", HOOKS, ids=[hook.target for hook in HOOKS])
HOOKS_WITH_SIGNATURE = [hook for hook in HOOKS if hook.parameters is not None]
ALL_SIGNATURES = pytest.mark.parametrize("hook", HOOKS_WITH_SIGNATURE, ids=[h.target for h in HOOKS_WITH_SIGNATURE])


def owner_of(target: str) -> tuple[Any, ...]:
    """Return the object that holds the hook, and the hook's name there."""
    module, _, path = target.partition(":")
    owner_path, _, name = path.rpartition(".")
    return (find(f"{module}:{owner_path}") if owner_path else importlib.import_module(module)), name


def remove(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Remove a hook, from vLLM's base classes too where it is inherited."""
    owner, name = owner_of(target)
    for holder in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        inside_vllm = inspect.ismodule(holder) or holder.__module__.startswith("vllm")
        if inside_vllm and name in vars(holder):
            monkeypatch.delattr(holder, name)


def function_of(names: Iterable[str]) -> Callable[..., Any]:
    """Return a function that takes these parameters."""
    return eval(f"lambda {', '.join(names)}: None")


def assert_refused(hook: Hook, status: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        require_hooks((hook.scope,))
    message = str(caught.value)
    assert hook.target in message
    assert hook.need in message
    assert status in message
    assert str(compat.vllm_version()) in message
    assert "install vllm>=0.32,<0.34" in message
    assert "serve without cospec" in message
    assert message.isprintable()
    assert len(message) < 600


@ALL_HOOKS
def test_every_hook_is_found_in_the_installed_vllm(hook: Hook) -> None:
    result = check_hook(hook)
    assert result.status == "found", result.detail


def test_all_hooks_together_are_accepted() -> None:
    require_hooks(SCOPES)
    assert {hook.scope for hook in HOOKS} == set(SCOPES)


@ALL_HOOKS
def test_a_vllm_without_a_hook_is_refused_with_hook_version_and_way_out(
    monkeypatch: pytest.MonkeyPatch, hook: Hook
) -> None:
    remove(monkeypatch, hook.target)
    status = check_hook(hook).status
    assert status in ("missing", "changed")  # changed: Python's or torch's own method of that name remains
    assert_refused(hook, status)


@pytest.mark.parametrize("module", sorted({hook.target.partition(":")[0] for hook in HOOKS}))
def test_a_vllm_without_the_module_of_a_hook_is_refused(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    hooks = [hook for hook in HOOKS if hook.target.startswith(module + ":")]
    monkeypatch.setitem(sys.modules, module, None)
    assert {check_hook(hook).status for hook in hooks} == {"missing"}
    assert_refused(hooks[0], "missing")


CHANGES = {
    "parameter renamed": lambda names: (*names[:-1], "renamed"),
    "parameter added": lambda names: (*names, "added"),
    "keyword-only parameter added": lambda names: (*names, "*", "added"),
    "parameter removed": lambda names: names[:-1],
    "all parameters removed": lambda names: (),
    "parameter inserted": lambda names: ("inserted", *names),
    "swallows everything": lambda names: ("*args", "**kwargs"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@ALL_SIGNATURES
def test_a_vllm_with_another_signature_is_refused(
    monkeypatch: pytest.MonkeyPatch, hook: Hook, change: Callable[..., Any]
) -> None:
    owner, name = owner_of(hook.target)
    monkeypatch.setattr(owner, name, function_of(change(hook.parameters)))
    assert check_hook(hook).status == "changed"
    assert_refused(hook, "changed")


@ALL_SIGNATURES
def test_a_hook_that_can_no_longer_be_called_is_refused(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    owner, name = owner_of(hook.target)
    monkeypatch.setattr(owner, name, None)
    assert check_hook(hook).status == "changed"
    assert_refused(hook, "changed")


@ALL_SIGNATURES
def test_optional_parameters_may_be_added(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    owner, name = owner_of(hook.target)
    assert hook.parameters is not None
    for more in ("added=None", "*args", "**kwargs"):
        monkeypatch.setattr(owner, name, function_of((*hook.parameters, more)))
        assert check_hook(hook).status == "found"


def test_our_own_replacement_does_not_hide_a_change_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: object, something_else: object) -> None:
        return None

    def replacement(self: object, target_model_config: object, target_parallel_config: object) -> None:
        return None

    setattr(replacement, MARK, changed)
    monkeypatch.setattr(EngineArgs, "create_speculative_config", replacement)
    hook = next(hook for hook in HOOKS if hook.target == FLAG)
    assert check_hook(hook).status == "changed"


def test_a_missing_hook_of_one_scope_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    remove(monkeypatch, "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors")
    require_hooks(("config", "cpu"))
    with pytest.raises(CompatibilityError):
        require_hooks(SCOPES)


def test_the_refusal_names_an_unknown_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "DISTRIBUTIONS", ("no-such-distribution",))
    remove(monkeypatch, FLAG)
    with pytest.raises(CompatibilityError, match="vLLM None"):
        require_hooks(("config",))


def test_register_twice_replaces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(EngineArgs.create_speculative_config, MARK, EngineArgs.create_speculative_config)
    monkeypatch.setattr(EngineArgs, "create_speculative_config", original)
    plugin.register()
    replacement = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is replacement
    assert getattr(replacement, MARK) is original
    assert not hasattr(original, MARK)


def test_register_replaces_nothing_but_the_translation_of_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {}
    for patch in (patch for patch in PATCHES if patch.level == "symbol"):
        owner, name = owner_of(patch.symbol)
        value = vars(owner)[name]
        before[patch.symbol] = getattr(value, MARK, value)
        monkeypatch.setattr(owner, name, before[patch.symbol])
    plugin.register()
    replaced = [symbol for symbol, value in before.items() if find(symbol) is not value]
    always = [patch.symbol for patch in PATCHES if patch.when == "always"]
    assert replaced == always == list(plugin.REPLACEMENTS)
    assert always[0] == FLAG


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: Any) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    handler = Records()
    plugin.logger.addHandler(handler)
    yield handler.messages
    plugin.logger.removeHandler(handler)


def test_register_survives_a_vllm_without_its_hook_and_says_so(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    remove(monkeypatch, FLAG)
    plugin.register()
    assert not hasattr(EngineArgs, "create_speculative_config")
    assert any("cospec is not available" in message and FLAG in message for message in log)


@pytest.mark.parametrize(
    "value",
    [lambda self: None, None, property(lambda self: None)],
    ids=["another function", "None", "property"],
)
def test_register_survives_a_hook_that_became_something_else(
    monkeypatch: pytest.MonkeyPatch, log: list[str], value: property | Callable[..., Any] | None
) -> None:
    monkeypatch.setattr(EngineArgs, "create_speculative_config", value)
    plugin.register()
    assert vars(EngineArgs)["create_speculative_config"] is value
    assert any("cospec is not available" in message for message in log)


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.9", "0.33.0", "0.33.1", "0.32.0+cpu", "0.33.0rc1", "0.32.1.dev3+g0123abc", "0.32.0.post1"],
)
def test_versions_from_0_32_to_0_33_are_supported(version: str) -> None:
    assert compat.version_supported(version)


@pytest.mark.parametrize(
    "version",
    [
        "0.31.9",
        "0.34.0",
        "0.34.1rc1",
        "0.3.2",
        "0.320.0",
        "1.32.0",
        "2.0",
        "0",
        "",
        ".",
        "0.x",
        "main",
        "dev+g012",
        None,
    ],
)
def test_other_versions_and_nonsense_are_not(version: str | None) -> None:
    assert not compat.version_supported(version)


def test_the_installed_version_is_known_and_supported() -> None:
    assert compat.version_supported(compat.vllm_version())


@pytest.mark.parametrize("patch", PATCHES, ids=[patch.symbol for patch in PATCHES])
def test_every_patched_symbol_exists_is_checked_at_start_and_is_accounted_for(patch: Patch) -> None:
    find(patch.symbol)
    assert patch.level == "process" or patch.symbol in {hook.target for hook in HOOKS}
    assert all((patch.why, patch.how, patch.remove_when, patch.when))


def test_the_kernel_that_is_swapped_in_vllms_registry_stands_in_the_ledger() -> None:
    (entry,) = [patch for patch in PATCHES if patch.level == "registry"]
    assert entry.symbol.replace(":", ".") == EXPAND_KERNEL


def test_what_the_compiled_loops_replace_stands_in_the_ledger_and_is_replaced_once() -> None:
    from vllm_cospec.kernels import loops

    (entry,) = [patch for patch in PATCHES if patch.symbol == loops.MENDED]
    assert (entry.level, loops.ORIGINAL) == ("process", MARK)
    mended = find(entry.symbol)
    original = getattr(mended, MARK)
    assert not hasattr(original, MARK)
    loops._mend_llvmlite()
    assert find(entry.symbol) is mended
    library: Any = object()
    with pytest.raises(AttributeError, match="__triton_kernel__"):
        mended(library, "__triton_kernel__")


def test_a_method_wrapped_on_an_object_is_handed_back_and_the_class_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, other_module: Any
) -> None:
    entry = Patch("module_under_test:Holder.method", why="", how="", remove_when="", when="", level="instance")
    monkeypatch.setattr(compat, "PATCHES", (entry,))

    class Other(other_module.Holder):
        pass

    wrapped, plain = Other(), Other()
    original: Any = wrap(entry.symbol, wrapped, lambda: f"after {original()}")
    assert (wrapped.method(), plain.method()) == ("after original", "original")


def test_wrap_refuses_what_is_not_in_the_ledger_or_stands_there_as_something_else(
    monkeypatch: pytest.MonkeyPatch, other_module: Any
) -> None:
    holder = other_module.Holder()
    symbol = "module_under_test:Holder.method"
    for level in ("symbol", "registry"):
        monkeypatch.setattr(compat, "PATCHES", (Patch(symbol, "", "", "", "", level),))
        with pytest.raises(AssertionError, match="ledger"):
            wrap(symbol, holder, lambda: None)
    assert holder.method() == "original"


@pytest.fixture
def other_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("module_under_test")

    class Holder:
        def method(self) -> str:
            return "original"

    vars(module).update(Holder=Holder, function=lambda: "original")
    monkeypatch.setitem(sys.modules, "module_under_test", module)
    return module


@pytest.mark.parametrize(
    "symbol", ["module_under_test:Holder.method", "vllm.v1.sample.rejection_sampler:expand_kernel"]
)
def test_replace_refuses_what_is_not_in_the_ledger(other_module: ModuleType, symbol: str) -> None:
    before = find(symbol)
    with pytest.raises((AssertionError, LookupError, ValueError), match="ledger"):
        replace(symbol, lambda original: None)
    assert find(symbol) is before


@pytest.mark.parametrize("path", ["Holder.method", "function"])
def test_replace_keeps_the_original_and_patches_once(
    monkeypatch: pytest.MonkeyPatch, other_module: ModuleType, path: str
) -> None:
    symbol = f"module_under_test:{path}"
    entry = Patch(symbol, why="", how="", remove_when="", when="")
    monkeypatch.setattr(compat, "PATCHES", (entry,))
    original, calls = find(symbol), []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        calls.append(original)
        return lambda *args: "replaced"

    replace(symbol, make)
    replacement = find(symbol)
    replace(symbol, make)
    assert find(symbol) is replacement
    assert replacement() == "replaced"
    assert getattr(replacement, MARK) is original
    assert calls == [original]


def test_find_says_what_is_missing() -> None:
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        find("vllm.engine.arg_utils:EngineArgs.nothing_of_this_name")
    with pytest.raises(ImportError, match="nothing_of_this_name"):
        find("vllm.nothing_of_this_name:x")
    result = check_hook(Hook("test", "vllm.engine.arg_utils:EngineArgs.nothing_of_this_name", None, "config"))
    assert (result.status, "nothing_of_this_name" in result.detail) == ("missing", True)
