"""The compiled backend (csrc/margin_cross_entropy)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .arguments import Arguments

_native.load()


def forward(a: Arguments, with_prediction: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    return torch.ops.lt_kernels_native.margin_cross_entropy_fwd(*a, with_prediction, with_grad)


def backward(grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, a: Arguments, needs: list[bool]) -> list[Tensor]:
    """Gradients of ``DIFFERENTIABLE``, each like its input; [0] where not needed."""
    return torch.ops.lt_kernels_native.margin_cross_entropy_bwd(grad_loss, grad_lse, rest, *a, needs)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (0-dim, same device), touching no memory where it is 1. Any dense ``gradient``."""
    torch.ops.lt_kernels_native.scale_gradient_(gradient, factor)
