"""The compiled extension: whether it loads, and what it was built with."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any


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
    if device_type in module.build_info()["devices"]:
        return None
    hint = f"LT_KERNELS_BUILD={device_type} builds them"
    return f"the extension was built without kernels for {device_type} tensors ({hint})"


def build_info() -> dict[str, Any] | None:
    """How the extension was built and which instruction set runs here; None where there is no extension."""
    module = load()
    return None if isinstance(module, str) else dict(module.build_info())
