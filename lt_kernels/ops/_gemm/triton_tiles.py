"""Pieces of a kernel whose logits are a tile of a matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from .._rows.triton_math import INTERPRETED


@triton.jit
def tile_product(a, b, sum, PRECISION: tl.constexpr):
    """Return a b + sum, in float32."""
    if INTERPRETED:  # which multiplies bfloat16 as if it were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def load_vectors(ptr, index, size, width, stride, FULL: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load ptr[index, :] of a [size, width] matrix, [len(index), BLOCK_D]; 0 outside of it. FULL: width is BLOCK_D."""
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = index[:, None] < size
    if not FULL:
        mask = mask & (d < width)
    return tl.load(ptr + index.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0)
