"""Matrix products by torch's own libraries, the buffers they write to, and the merge of blocks' sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._native import empty_pooled
from .._native import load as load_native
from .layout import padded

#: The least norm, as in F.normalize.
EPS = 1e-12
#: Elements of a temporary where a product or a projection is done block by block.
_BLOCK = 2**22


def empty(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised matrix, on the CPU from memory that keeps its pages if the extension is built."""
    if device.type == "cpu" and not isinstance(load_native(), str):
        return empty_pooled((rows, columns), dtype)
    return torch.empty((rows, columns), dtype=dtype, device=device)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an ``empty`` contiguous matrix shaped like ``tensor``."""
    return empty(tensor.shape[0], tensor.shape[1], dtype or tensor.dtype, tensor.device)


def buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised matrix [rows, columns] whose rows start at multiples of 64 bytes."""
    return empty(rows, padded(columns, dtype), dtype, device)[:, :columns]


def memory_of(matrix: Tensor) -> Tensor:
    """Return all elements between the first and the last one of a ``buffer``, dense: its rows with what pads them."""
    rows, columns = matrix.shape
    return matrix.as_strided(((rows - 1) * matrix.stride(0) + columns if matrix.numel() > 0 else 0,), (1,))


def fake_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor with the strides of a ``buffer``, where tensors have no memory."""
    return torch.empty_strided((rows, columns), (padded(columns, dtype), 1), dtype=dtype, device=device)


def slices(size: int, most: int) -> list[slice]:
    """Return the parts of at most ``most`` elements that make up ``size``."""
    return [slice(begin, min(begin + most, size)) for begin in range(0, size, max(most, 1))]


def merge(rest: Tensor, peak: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Add a block's maximum and sum of exponentials to those so far, ``rest``.

    Returns the factors of sums relative to each maximum that make them relative to the larger one.
    """
    before = torch.where(rest[1] != 0, rest[0], -math.inf)
    here = torch.where(total != 0, peak, -math.inf)
    high = torch.maximum(before, here)
    high = torch.where(high == -math.inf, 0.0, high)
    kept, added = (before - high).exp(), (here - high).exp()
    rest[1] = rest[1] * kept + total * added
    rest[0] = high
    return kept, added


def inverse_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / |w_j| of the rows of a matrix, in ``dtype``."""
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    return norms.clamp_min_(EPS).reciprocal_()


def logits_into(out: Tensor, input: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Compute out [n, c] = input [n, D] factor [c, D]^T + bias [c]."""
    if bias is None:
        return torch.mm(input, factor.t(), out=out)
    return torch.addmm(bias.to(out.dtype), input, factor.t(), out=out)


def added(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Add left [m, k] right [k, n] to total in place, in ``dtype``; return the product in new memory without a total.

    Sums are kept in ``dtype`` whatever the factors'. Each product is rounded to the factors' dtype first where the
    library cannot do otherwise (on the CPU).
    """
    if left.dtype == dtype:
        if total is None:
            return torch.mm(left, right, out=empty(left.shape[0], right.shape[1], dtype, left.device))
        return torch.addmm(total, left, right, out=total)
    # by the functional overload: the others are not to be relied on before torch 2.13
    wide = left.device.type == "cuda" and torch.version.hip is None and dtype == torch.float32
    if wide and total is None:
        return torch.mm(left, right, out_dtype=dtype)
    fresh = total is None
    result = empty(left.shape[0], right.shape[1], dtype, left.device) if total is None else total
    for part in blocks(result):
        product = torch.mm(left[part], right, out_dtype=dtype) if wide else torch.mm(left[part], right)
        result[part].copy_(product) if fresh else result[part].add_(product)
    return result


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute out = left right, rounded once to ``out``'s dtype where the library can."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(added(None, left, right, out.dtype))


def blocks(matrix: Tensor) -> list[slice]:
    """Return the rows of a matrix in blocks whose temporaries are small."""
    return slices(matrix.shape[0], max(1, _BLOCK // max(1, matrix.shape[1])))


def project_(gradient: Tensor, weight: Tensor, inverse_norm: Tensor, of_directions: bool) -> None:
    """Turn G, the gradient of w_j / |w_j| times 1 / |w_j|, into that of w_j: g_j - (g_j . w_j) w_j / |w_j|^2.

    of_directions: the factor 1 / |w_j| is still missing from G.
    """
    # where |w| < eps the norm is a constant, as in F.normalize
    inverse_square = torch.where(inverse_norm < 1 / EPS, inverse_norm.square(), torch.zeros_like(inverse_norm))
    for part in blocks(gradient):
        g, w = gradient[part], weight[part].to(inverse_norm.dtype)
        wide = g.to(inverse_norm.dtype)
        if of_directions:
            wide = wide * inverse_norm[part, None]
        along = (wide * w).sum(1) * inverse_square[part]
        torch.addcmul(wide, w, along[:, None], value=-1, out=wide)
        if wide is not g:
            g.copy_(wide)
