"""The compiled backend (csrc/margin_cross_entropy)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._registry import flatten
from .arguments import Arguments

_native.load()


def forward(
    a: Arguments, with_prediction: bool, with_grad: bool, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``. ``out``: where grad_input is written; it may be ``a.input`` itself."""
    *rows, grad = torch.ops.lt_kernels_native.margin_cross_entropy_fwd(*flatten(a), with_prediction, with_grad, out)
    return (*rows, out if with_grad and out is not None else grad)


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    rest: Tensor,
    a: Arguments,
    needs: list[bool],
    *,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of ``DIFFERENTIABLE``, each like its input; [0] where not needed. ``out``: as in ``forward``."""
    grads = torch.ops.lt_kernels_native.margin_cross_entropy_bwd(grad_loss, grad_lse, rest, *flatten(a), needs, out)
    return [out, *grads[1:]] if needs[0] and out is not None else grads


def mean_coefficient(
    target: Tensor,
    mixed_target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    classes: int,
    dtype: torch.dtype,
    factor: float,
) -> Tensor:
    """See ``op.mean_coefficient``; on the CPU."""
    result: Tensor = torch.ops.lt_kernels_native.mean_coefficient(
        target, mixed_target, weight, ignore_index, classes, dtype, factor
    )
    return result


def ordered_sum(values: Tensor) -> Tensor:
    """See ``op.sum_rows``; on the CPU."""
    result: Tensor = torch.ops.lt_kernels_native.ordered_sum(values)
    return result


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (0-dim, same device), touching no memory where it is 1. Any dense ``gradient``."""
    torch.ops.lt_kernels_native.scale_gradient_(gradient, factor)
