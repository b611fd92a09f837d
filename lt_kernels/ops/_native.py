"""The compiled extension: whether it loads, and what it was built with."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def load() -> ModuleType | str:
    """The extension module, or the reason why there is none."""
    try:
        from .. import _C
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return "the extension is not built (`LT_KERNELS_BUILD=cpu pip install --no-build-isolation .` builds it)"
        return f"the extension does not load: {error}"
    return _C


def unavailable_reason(device_type: str) -> str | None:
    """None where the extension has kernels for tensors of that device type, else the reason why not."""
    module = load()
    if isinstance(module, str):
        return module
    if device_type == "cuda" and device_type in module.build_info()["devices"]:
        return _architecture_reason(module.build_info()["cuda_architectures"])
    if device_type in module.build_info()["devices"]:
        return None
    hint = f"LT_KERNELS_BUILD={device_type} builds them"
    return f"the extension was built without kernels for {device_type} tensors ({hint})"


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` (as in TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "10.0+PTX") runs on a GPU."""
    for name in architectures:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if found is None:  # a code name; torch's builder knows those
            return True
        built = (int(found[1]), int(found[2]))
        if built == capability or (built[0] == capability[0] and built[1] <= capability[1] and not found[3]):
            return True
        if found[4] and built <= capability and not found[3]:
            return True
    return False


def _architecture_reason(architectures: list[str]) -> str | None:
    if not torch.cuda.is_available():
        return None  # asked on a machine without a GPU: nothing to compare with
    capability = torch.cuda.get_device_capability()
    if runs_on(architectures, capability):
        return None
    built, here = ", ".join(architectures), ".".join(map(str, capability))
    return f"the extension was built for compute capability {built}, not {here} (TORCH_CUDA_ARCH_LIST={here})"


def empty_pooled(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor for a buffer of every step: large ones keep their pages between steps.

    Its memory returns to a pool when it dies (csrc/common/cpu/memory.h has its bound). Only where the extension loads.
    """
    return torch.ops.lt_kernels_native.empty_pooled(size, dtype)


def build_info() -> dict[str, Any] | None:
    """How the extension was built and which instruction set runs here; None where there is no extension."""
    module = load()
    return None if isinstance(module, str) else dict(module.build_info())
