"""Pieces of a kernel whose logits are tiles of a matrix product, summed up in splits of one side's tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._rows.triton_math import INTERPRETED


class Factors(NamedTuple):
    """The two matrices of a product, one argument of a kernel. Both have unit stride along D."""

    left_ptr: Any  # [N, D]
    right_ptr: Any  # [C, D]
    width: Any  # D
    left_stride: Any
    right_stride: Any
    block_d: Any  # constexpr, like those below: D rounded up to a power of two
    full: Any  # whether D is block_d
    precision: Any  # of products of float32


class ColumnSums(NamedTuple):
    """Sums over the rows of at most two values a column, one argument of a kernel."""

    ptr: Any  # [splits, first + second, C]; None if there is neither
    first: Any  # constexpr, like the next: whether the first value is summed
    second: Any


@triton.jit
def tile_product(a, b, sum, PRECISION: tl.constexpr):
    """Return a b + sum, in float32."""
    if INTERPRETED:  # which multiplies bfloat16 as if it were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def inner_products(a, b, f):
    """Return the inner products of the vectors a with the vectors b."""
    return tile_product(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), f.precision)


@triton.jit
def load_vectors(ptr, stride, index, size, f):
    """Load ptr[index, :] of a [size, D] matrix, [len(index), block_d]; 0 outside of it."""
    d = tl.arange(0, f.block_d)[None, :]
    mask = index[:, None] < size
    if not f.full:
        mask = mask & (d < f.width)
    return tl.load(ptr + index.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0)


@triton.jit
def load_left(f, index, size):
    """Load rows of the left matrix."""
    return load_vectors(f.left_ptr, f.left_stride, index, size, f)


@triton.jit
def load_right(f, index, size):
    """Load rows of the right matrix."""
    return load_vectors(f.right_ptr, f.right_stride, index, size, f)


@triton.jit
def split_tiles(per_split, size, BLOCK: tl.constexpr):
    """Return the program's split, and the first and the end of its tiles of BLOCK elements of ``size``."""
    split = tl.program_id(1)
    first = split * per_split
    return split, first, tl.minimum(first + per_split, tl.cdiv(size, BLOCK))


@triton.jit
def store_gradient(ptr, grad, split, index, size, f):
    """Store a split's gradient of the vectors ``index`` in [splits, size, D]."""
    d = tl.arange(0, f.block_d)[None, :]
    offset = (split * tl.cast(size, tl.int64) + index)[:, None] * f.width + d
    tl.store(ptr + offset, grad.to(ptr.dtype.element_ty), mask=(index < size)[:, None] & (d < f.width))


@triton.jit
def store_sums(sums, first, second, split, index, columns, inside):
    """Store a split's sums of the columns ``index``."""
    if sums.ptr is not None:
        size = tl.cast(columns, tl.int64)
        ptr = sums.ptr + split * (sums.first + sums.second) * size + index
        if sums.first:
            tl.store(ptr, first, mask=inside)
        if sums.second:
            tl.store(ptr + sums.first * size, second, mask=inside)
