"""The compiled backend: csrc/expert_cross_entropy on the CPU; on CUDA the rows kernel, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..margin_cross_entropy.arguments import Arguments as RowArguments
from .arguments import Arguments
from .looped import forward as _looped

_native.load()


def forward(a: Arguments, with_ensemble: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``. On CUDA one launch for each expert, and a second read for the ensemble."""
    if a.target.device.type != "cpu":
        return _looped(a, with_ensemble, with_grad, "native")
    options = [getattr(a, name) for name in RowArguments._fields[1:]]
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.lt_kernels_native.expert_cross_entropy_fwd(
        a.logits, *options, a.log_prior, a.ensemble_coefficient, a.taus, with_ensemble, with_grad
    )
    return result
