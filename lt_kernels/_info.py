"""What is installed, and which backend can run which op where."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from . import _settings
from ._version import __version__
from .ops import _native
from .ops._backend import unavailable_reason
from .ops.expert_cross_entropy.op import OP as EXPERT_CROSS_ENTROPY
from .ops.expert_divergence.op import OP as EXPERT_DIVERGENCE
from .ops.expert_fusion.op import OP as EXPERT_FUSION
from .ops.linear_margin_cross_entropy.op import OP as LINEAR
from .ops.margin_cross_entropy.op import OP as ROWS
from .ops.partitioned_logsumexp.op import OP as PARTITIONED

OPS = (ROWS, LINEAR, EXPERT_CROSS_ENTROPY, EXPERT_FUSION, EXPERT_DIVERGENCE, PARTITIONED)


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Versions, devices, settings, build of the extension, and for each op the backends that cannot run and why.

    ``info()["backends"][op][device_type][backend]`` is None where the backend is available, else the reason. Everything
    in the dictionary is JSON-serialisable.
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
                device: {backend: unavailable_reason(op, backend, device) for backend in _settings.BACKENDS}
                for device in ("cpu", "cuda")
            }
            for op in OPS
        },
    }
