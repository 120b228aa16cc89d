"""A stand-in Triton backend, for machines without a GPU.

vLLM disables its Triton kernels, and Model Runner V2 with them, unless Triton lists a backend for the platform. With
this entry a process without a GPU can import them, either to interpret them (``TRITON_INTERPRET=1``, how the tests run
V2) or to compile them for a GPU that is not there (the offline report). Nothing of this is used while serving.
"""

from __future__ import annotations

import math
import os
from typing import Any


def install() -> None:
    """List a backend named "cpu". Call it before vLLM is imported. Idempotent."""
    from triton.backends import Backend, backends

    if "cpu" not in backends:
        backends["cpu"] = Backend(compiler=_Compiler, driver=_Driver)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_language_once()
        _remember_types()
        _reduce_by_halves()
        _count_with_tensors()
        _accept_integer_masks()
        _give_log1p()


class _Compiler:
    """Compiles for nothing: GPUs keep their own backends."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return False


class _Driver:
    """Answers what Triton and vLLM ask of a driver when nothing is launched on a device."""

    @staticmethod
    def is_active() -> bool:
        return False

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", "interpreter", 0)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def _patch_language_once() -> None:
    """Let the interpreter prepare Triton's language once per process instead of at every call of a device function.

    It replaces the same members each time; looking for them takes half of a test's time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    if hasattr(original, "__wrapped__"):
        return
    prepared: set[int] = set()  # the names of the language that were

    def patch(function: Any) -> Any:
        names = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if not names <= prepared:
            original(function)
            prepared.update(names)
        return interpreter._LangPatchScope()  # which restores nothing: who interprets does not compile

    patch.__wrapped__ = original  # type: ignore[attr-defined]
    interpreter._patch_lang = patch


def _remember_types() -> None:
    """Let the interpreter look up a type's numpy type, name and size, and a tensor's shape.

    It works them out at every operation, which takes a quarter of a test's time.
    """
    from triton.language import core
    from triton.runtime import interpreter

    numpy_type, make_block = interpreter._get_np_dtype, core.block_type.__init__
    if hasattr(numpy_type, "__wrapped__"):
        return
    numpy_types: dict[str, Any] = {}  # by the name of the type
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def get_np_dtype(dtype: Any) -> Any:
        found = numpy_types.get(dtype.name)
        if found is None:
            found = numpy_types[dtype.name] = numpy_type(dtype)
        return found

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        if any(type(size) is not int for size in shape):
            make_block(self, element_ty, shape)
            return
        key = element_ty.name, tuple(shape)
        known = blocks.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            known = blocks[key] = dict(vars(self))
        vars(self).update(known, element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        block = type.shape if type.is_block() else ()
        known = shapes.get(block)
        if known is None:
            shape = core.tuple([core.constexpr(size) for size in block])
            known = shapes[block] = core.constexpr(math.prod(block)), shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known

    get_np_dtype.__wrapped__ = numpy_type  # type: ignore[attr-defined]
    interpreter._get_np_dtype = get_np_dtype
    core.block_type.__init__ = init_block
    core.tensor.__init__ = init_tensor


def _reduce_by_halves() -> None:
    """Let the interpreter reduce neighbours pairwise, as a GPU does; it would combine one element after the other.

    The function is associative by Triton's contract; elements keep their order. It takes a third of a step's time.
    """
    import numpy as np
    from triton.runtime.interpreter import ReduceOps

    original = ReduceOps.generic_reduce
    if hasattr(original, "__wrapped__"):
        return

    def reduce(self: Any, parts: Any) -> Any:
        size = 0 if self.axis is None or self.keep_dims else parts[0].handle.data.shape[self.axis]
        if size < 2 or size & (size - 1):
            return original(self, parts)
        types = [part.dtype for part in parts]
        arrays = [np.moveaxis(part.handle.data, self.axis, 0) for part in parts]
        while len(arrays[0]) > 1:
            even, odd = (
                [self.to_tensor(a[first::2], t) for a, t in zip(arrays, types, strict=True)] for first in (0, 1)
            )
            combined = self.combine_fn.fn(*even, *odd)
            arrays = [part.handle.data for part in (combined if isinstance(combined, tuple) else (combined,))]
        return [self.to_tensor(a[0], t) for a, t in zip(arrays, types, strict=True)]

    reduce.__wrapped__ = original  # type: ignore[attr-defined]
    ReduceOps.generic_reduce = reduce


def _count_with_tensors() -> None:
    """Let ``tl.range`` count with tensors, as compiled loops do: vLLM's top-k and top-p kernel casts its counter."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang_core
    if hasattr(original, "__wrapped__"):
        return

    def patch(language: Any, scope: Any) -> None:
        original(language, scope)
        numbers = language.range

        def count(*args: Any, **options: Any) -> Any:
            for number in numbers(*args, **options):
                yield tl.tensor(interpreter.TensorHandle(np.array([number], np.int32), tl.int32), tl.int32)

        scope.set_attr(language, "range", count)

    patch.__wrapped__ = original  # type: ignore[attr-defined]
    interpreter._patch_lang_core = patch


def _accept_integer_masks() -> None:
    """Let the interpreter take masks such as ``vector & scalar``, whose numpy type is an integer.

    The compiler accepts them, and vLLM's cache of draft logits is written with one; Triton 3.9's interpreter does not.
    """
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    for name in ("create_masked_load", "create_masked_store"):
        original = getattr(Builder, name)
        if hasattr(original, "__wrapped__"):
            continue
        position = {"create_masked_load": 1, "create_masked_store": 2}[name]

        def accept(self: Any, *args: Any, _original: Any = original, _mask: int = position) -> Any:
            args[_mask].data = args[_mask].data.astype(bool)
            return _original(self, *args)

        accept.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(Builder, name, accept)


def _give_log1p() -> None:
    """Give the interpreter the one function of libdevice vLLM's resampling calls; its own is an empty stub."""
    import numpy as np
    from triton.language import tensor
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def log1p(arg0: Any, **_: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return tensor(TensorHandle(np.log1p(arg0.handle.data), arg0.handle.dtype), arg0.type)

    libdevice.log1p = log1p
