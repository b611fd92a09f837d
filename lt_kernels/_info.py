"""What is installed, and which backend can run which op on which device.

This is not part of ``_settings``: every op reads the settings, and ``info`` asks every op.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
import platform
from typing import Any

import torch

from . import _settings, ops
from ._version import __version__
from .ops import _native
from .ops._backend import unavailable_reason

#: Every op has a folder of its own; those with an underscore hold what ops share.
OPS = tuple(sorted(found.name for found in pkgutil.iter_modules(ops.__path__) if found.name[0] != "_"))


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unavailable_reason(op: str, backend: str, device: str) -> str | None:
    """Return the reason to act on: a missing package or build comes before a missing device."""
    reason = unavailable_reason(op, backend, device)
    if reason is None and device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here"
    return reason


def info() -> dict[str, Any]:
    """Return versions, devices, settings, the extension's build, and which backend can run each op.

    ``info()["backends"][op][device_type][backend]`` is None if the backend is available here, else the reason why it is
    not. Everything in the dictionary is JSON-serialisable.
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "lt_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _distribution_version("triton"),
        "devices": ["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(devices))],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "settings": {
            "backend": _settings.backend,
            "checks": _settings.checks,
            "gradient_policy": _settings.gradient_policy,
            "memory_budget": _settings.memory_budget,
        },
        "extension": _native.build_info(),
        "backends": {
            op: {
                device: {backend: _unavailable_reason(op, backend, device) for backend in _settings.BACKENDS}
                for device in ("cpu", "cuda")
            }
            for op in OPS
        },
    }
