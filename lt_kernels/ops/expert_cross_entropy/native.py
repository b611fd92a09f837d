"""The compiled backend: csrc/expert_cross_entropy on the CPU; on CUDA the rows kernel, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._registry import flatten
from .arguments import Arguments
from .looped import forward as _looped

_native.load()


def forward(a: Arguments, with_ensemble: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``. On CUDA one launch for each expert, and a second read for the ensemble."""
    if a.options.target.device.type != "cpu":
        return _looped(a, with_ensemble, with_grad, "native")
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.lt_kernels_native.expert_cross_entropy_fwd(
        *flatten(a), with_ensemble, with_grad
    )
    return result
