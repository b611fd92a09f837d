"""Whether Triton kernels can run here."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _import_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation must not break the other backends
        return f"importing triton failed: {error}"
    return None


def unavailable_reason(device_type: str) -> str | None:
    """Return None where Triton kernels can run on tensors of that device type, else the reason why not."""
    reason = _import_error()
    if reason is not None:
        return reason
    if interpreting():
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 is set: the interpreter takes CPU tensors"
    return None if device_type == "cuda" else "Triton kernels need CUDA tensors (or TRITON_INTERPRET=1 for testing)"


def launch_with(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **others: Any) -> None:
    """Launch with those of ``arguments`` that the kernel takes, and the others."""
    named = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    kernel[grid](**(named | others))
