"""Which backend runs an op: availability with reasons, and the choice made once per forward call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from .. import _settings

#: Order in which "auto" tries the backends, by device type.
_PREFERENCE = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}
_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot run the call; the message says why."""


def unavailable_reason(op: str, backend: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """None where ``backend`` can run ``op`` on tensors of that device type and dtype, else the reason why not."""
    if backend == "reference":
        return None
    if backend == "native":
        from . import _native

        return _native.unavailable_reason(device_type)
    from . import _triton

    if dtype is not None and dtype not in _HALF_AND_SINGLE:
        return f"its kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    return _triton.unavailable_reason(device_type)


@functools.cache
def _resolve(op: str, requested: str, device_type: str, dtype_name: str) -> str:
    dtype = getattr(torch, dtype_name)
    if requested != "auto":
        reason = unavailable_reason(op, requested, device_type, dtype)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend {requested!r} cannot run {op} on {device_type} tensors of dtype {dtype_name}: {reason}"
            )
        return requested
    for backend in _PREFERENCE.get(device_type, ("reference",)):
        if unavailable_reason(op, backend, device_type, dtype) is None:
            return backend
    raise AssertionError("unreachable: the reference backend is always available")


def _constant(op: str, requested: str, device_type: str, dtype_name: str) -> str:
    return _resolve(op, requested, device_type, dtype_name)


# What torch.compiler.assume_constant_result sets, without importing dynamo (and Triton) with the package. On a function
# of its own because dynamo looks through functools.cache.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(op: str, tensor: torch.Tensor) -> str:
    """The backend that runs ``op`` on ``tensor``: the one asked for by name, or the best available one.

    Raises:
        BackendUnavailableError: if a backend asked for by name cannot run the call.
    """
    return _constant(op, _settings.backend, tensor.device.type, str(tensor.dtype).removeprefix("torch."))


def plain_call(op: str, *arguments: object) -> torch.Tensor | None:
    """Return the loss of a plain call of ``op``; None if it is none, and goes through the operators.

    ``arguments`` are those of the public function in the order in which the native backend reads them. Plain are calls
    on ordinary CPU tensors with arguments that are all good, where nothing but autograd takes part in operators
    (csrc/common/plain.h).
    """
    if torch.compiler.is_compiling() or _settings.backend not in ("auto", "native"):
        return None
    function = _plain_function(op)
    return None if function is None else function(*arguments, _settings.gradient_policy)


@functools.cache
def _plain_function(op: str) -> Callable[..., torch.Tensor | None] | None:
    from . import _native

    function: Callable[..., torch.Tensor | None] | None = getattr(_native.load(), op, None)
    return function


@functools.cache
def load(op: str, backend: str) -> ModuleType:
    """The module with ``forward`` and ``backward`` of one backend of one op, imported at first use."""
    return importlib.import_module(f".{op}.{backend}", __package__)
