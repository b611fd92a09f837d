"""Launches of a call on a GPU, counted without one: Triton kernels, and torch's operators that compute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

#: Operators that launch nothing besides views; the last two are asked of dtypes.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "empty_pooled",
    "new_empty",
    "detach",
    "alias",
    "_unsafe_view",
    "_reshape_alias",
    "promote_types",
    "result_type",
}


class Launches(TorchDispatchMode):
    """Names of what is launched while the mode is on. Every operator of torch that is no view counts as one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "lt_kernels":  # what its implementation launches
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def count_launches(monkeypatch: pytest.MonkeyPatch, forward: Callable[[], torch.Tensor]) -> tuple[list[str], list[str]]:
    """Return what a forward pass launches, and its backward pass if the result requires a gradient.

    Kernels do not run: results are whatever their memory held. Values are not read, as on a GPU without checks.
    """
    launches = Launches()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            launches.names.append(kernel.__name__)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", run)
        for name, module in list(sys.modules.items()):
            if name.startswith("lt_kernels.") and hasattr(module, "reads_values"):
                patch.setattr(module, "reads_values", lambda tensor: False)
        with launches:
            result = forward()
        first, launches.names = launches.names, []
        if isinstance(result, torch.Tensor) and result.requires_grad:
            with launches:
                result.backward()
    return first, launches.names
