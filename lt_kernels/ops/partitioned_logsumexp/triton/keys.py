"""Arithmetic and loads that all kernels of the partitioned log-sum-exp share.

With a = scale * learned_scale the logits are u_ij = (a key_scale_j) z_ij + key_bias_j, one fused multiply-add, and an
exponential relative to a row's reference r is exp2(log2(e) u - log2(e) r), one more. Both are written once, here:
forward and backward agree to the last bit. A column is positive for a row of the same label and negative for the
others, so that one exponential serves both sides: exp(u - (r of the positive or of the negative ones)).

If a small number bounds all |u| (CONSTANT), it is the reference of every row and of both sides: nothing is rescaled, no
maximum is needed, and exp2((log2(e) a) z - log2(e) bound) is a single fused multiply-add away from z.

Blocks: tiles are [LANES, GROUP] columns of a row, each thread has GROUP contiguous ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..._gemm.triton_tiles import tile_product
from ..._rows.triton_math import INF, INTERPRETED, NO_COLUMN, finite_reference

LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) in float32

#: Rows of the statistics, and of backward's terms, as in arguments.py; a test compares them.
NEG_PEAK, NEG_MASS, POS_PEAK, POS_MASS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
POS_SUM, NUM_POS, NEG_SLOPE, POS_SLOPE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)


@triton.jit
def add_product(a, b, sum, PRECISION: tl.constexpr):
    """Return a b + sum. In float32 a tile's product is added as a whole: roundings of many terms would add up."""
    if a.dtype == tl.float32:
        return sum + tile_product(a, b, tl.zeros(sum.shape, tl.float32), PRECISION)
    else:
        return tile_product(a, b, sum, PRECISION)


@triton.jit
def round_gradient(dz, scale, vectors):
    """Return the gradient of products over the scale in the vectors' dtype; in float16 with the scale, as small numbers
    soon have few digits there."""
    if vectors.dtype == tl.float16:
        dz = dz * scale
    return dz.to(vectors.dtype)


@triton.jit
def scale_gradient(grad, scale, vectors):
    """Return the sum of products of ``round_gradient`` times the scale."""
    if vectors.dtype != tl.float16:
        grad = scale * grad
    return grad


@triton.jit
def round_fma(x, y, z):
    """Return x y + z, rounded once."""
    if INTERPRETED:  # which rounds twice
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def fast_exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:  # results below 1e-38 become 0: tl.exp2 spends 3 more instructions to keep them
        return libdevice.exp2(x)


@triton.jit
def to_base2(reference):
    """Return log2(e) reference, rounded whatever it is used for."""
    return round_fma(reference, LOG2E, 0.0)


@triton.jit
def relative_exp(u, reference2):
    """Return exp(u - reference) up to a factor near 1 that all u of the reference share: see reference_error."""
    return fast_exp2(round_fma(u, LOG2E, -reference2))


@triton.jit
def reference_error(reference):
    """Return the factor that relative_exp lacks because to_base2 rounds."""
    return fast_exp2(-round_fma(reference, LOG2E, -to_base2(reference)))


@triton.jit
def relative_exp_of_product(z, u_of_z, offset, reference2, CONSTANT: tl.constexpr):
    """Return exp(u - reference) of products z, u = u_of_z z + offset; both are to the base 2 where CONSTANT."""
    if CONSTANT:
        return fast_exp2(round_fma(z, u_of_z, offset))
    else:
        return relative_exp(round_fma(z, u_of_z, offset), reference2)


@triton.jit
def rescale_factor(before, after):
    """Return the factor of sums relative to the maximum ``before`` that makes them relative to the larger ``after``."""
    return fast_exp2(tl.minimum(to_base2(finite_reference(before)) - to_base2(finite_reference(after)), 0.0))


@triton.jit
def load_masked(ptr, index, real, other):
    """Load ptr[index], ``other`` where not ``real``; None: all are."""
    if real is None:
        return tl.load(ptr + index)
    else:
        return tl.load(ptr + index, mask=real, other=other)


@triton.jit
def load_keys(key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, columns, real, CONSTANT: tl.constexpr):
    """Load the keys' labels, slope and offset of their logits, and key_scale. Slope and offset are to the base 2 and
    relative to the bound where CONSTANT."""
    label = load_masked(key_label_ptr, columns, real, 0)
    key_scale = 1.0
    if CONSTANT:
        slope = scale * LOG2E
        offset = -bound * LOG2E
    else:
        slope = scale
        offset = scale * 0.0
        if key_scale_ptr is not None:
            key_scale = load_masked(key_scale_ptr, columns, real, 0.0)
            slope = scale * key_scale
        if key_bias_ptr is not None:
            offset = load_masked(key_bias_ptr, columns, real, -INF)
    return label, slope, offset, key_scale


@triton.jit
def load_excluded(exclude_ptr, row, inside):
    """Load the columns that rows leave out, -1 for none; also return the smallest and the largest of them."""
    exclude = tl.full(row.shape, -1, tl.int32)
    low, high = NO_COLUMN, -1
    if exclude_ptr is not None:
        exclude = tl.load(exclude_ptr + row, mask=inside, other=-1)
        low, high = tl.min(tl.where(exclude < 0, NO_COLUMN, exclude), 0), tl.max(exclude, 0)
    return exclude, low, high


@triton.jit
def block_columns(begin, columns, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Return the columns from ``begin`` on, which are in whole groups, which are in a last group that is not full, and
    whether there is one."""
    group = begin + (tl.arange(0, LANES) * GROUP)[:, None]
    column = group + tl.arange(0, GROUP)[None, :]
    cut = columns % GROUP
    edge = (column >= columns - cut) & (column < columns)
    return column, group <= columns - GROUP, edge, (cut > 0) & (begin + LANES * GROUP > columns - cut)


@triton.jit
def load_wide(ptrs, whole, edge, has_edge, other):
    """Load from the pointers, whole groups with the widest accesses; ``other`` where there is no column."""
    x = tl.load(ptrs, mask=whole, other=other)
    if has_edge:
        x = tl.where(edge, tl.load(ptrs, mask=edge, other=other), x)
    return x


@triton.jit
def load_wide_keys(key_label_ptr, key_scale_ptr, key_bias_ptr, scale, column, whole, edge, has_edge):
    """Load the keys' labels, their logits' slope and offset, and key_scale."""
    label = load_wide(key_label_ptr + column, whole, edge, has_edge, 0)
    slope, offset, key_scale = scale, scale * 0.0, 1.0
    if key_scale_ptr is not None:
        key_scale = load_wide(key_scale_ptr + column, whole, edge, has_edge, 0.0)
        slope = scale * key_scale
    if key_bias_ptr is not None:
        offset = load_wide(key_bias_ptr + column, whole, edge, has_edge, -INF)
    return label, slope, offset, key_scale
