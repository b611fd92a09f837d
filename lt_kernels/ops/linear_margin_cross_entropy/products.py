"""Matrix products of a linear head, by torch's own libraries, and the buffers they write to."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import empty_pooled
from .._native import load as load_native
from .arguments import Arguments
from .plan import padded

_EPS = 1e-12  # as in F.normalize
#: Elements of a temporary where a product or a projection is done block by block.
_BLOCK = 2**22


def empty(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix; on the CPU from memory that keeps its pages between steps, if the extension is built."""
    if device.type == "cpu" and not isinstance(load_native(), str):
        return empty_pooled((rows, columns), dtype)
    return torch.empty((rows, columns), dtype=dtype, device=device)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same for a contiguous matrix shaped like ``tensor``."""
    return empty(tensor.shape[0], tensor.shape[1], dtype or tensor.dtype, tensor.device)


def buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix [rows, columns] whose rows start at multiples of 64 bytes."""
    return empty(rows, padded(columns, dtype), dtype, device)[:, :columns]


def inverse_norms(a: Arguments) -> Tensor:
    """1 / |linear_weight_j| in the compute dtype, [C * K]."""
    norms = torch.linalg.vector_norm(a.factor, dim=1, dtype=a.compute_dtype)
    return norms.clamp_min_(_EPS).reciprocal_()


def logits_into(out: Tensor, input: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """out [n, c] = input [n, D] factor [c, D]^T + bias [c]."""
    if bias is None:
        return torch.mm(input, factor.t(), out=out)
    return torch.addmm(bias.to(out.dtype), input, factor.t(), out=out)


def accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [m, n] (+)= left [m, k] right [k, n]; the sum is kept in ``total``'s dtype, whatever the factors'."""
    if total.dtype == left.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            torch.addmm(total, left, right, out=total)
    elif total.device.type == "cuda":
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:  # the CPU's library rounds each product to the factors' dtype
        block = max(1, _BLOCK // max(1, right.shape[1]))
        for begin in range(0, total.shape[0], block):
            product = torch.mm(left[begin : begin + block], right)
            part = total[begin : begin + block]
            part.copy_(product) if first else part.add_(product)


def project_(gradient: Tensor, a: Arguments, inverse_norm: Tensor) -> None:
    """Turn the gradient of w_j / |w_j| times 1 / |w_j| into that of w_j: g_j - (g_j . w_j) w_j / |w_j|^2."""
    weight = a.linear_weight
    # where |w| < eps the norm is a constant, as in F.normalize
    inverse_square = torch.where(inverse_norm < 1 / _EPS, inverse_norm.square(), torch.zeros_like(inverse_norm))
    block = max(1, _BLOCK // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], block):
        g, w = gradient[begin : begin + block], weight[begin : begin + block].to(a.compute_dtype)
        wide = g.to(a.compute_dtype)
        along = (wide * w).sum(1) * inverse_square[begin : begin + block]
        torch.addcmul(wide, w, along[:, None], value=-1, out=wide)
        if wide is not g:
            g.copy_(wide)
