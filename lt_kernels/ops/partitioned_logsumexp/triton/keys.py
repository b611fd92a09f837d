"""Arithmetic and loads that all kernels of the partitioned log-sum-exp share.

With a = scale * learned_scale the logits are u_ij = (a key_scale_j) z_ij + key_bias_j, one fused multiply-add, and an
exponential relative to a row's reference r is exp2(log2(e) u - log2(e) r), one more. Both are written once, here:
forward and backward agree to the last bit. A column is positive for a row of the same label and negative for the
others, so that one exponential serves both sides: exp(u - (r of the positive or of the negative ones)).

If a small number bounds all |u| (``bounded``), it is the reference of every row and of both sides: nothing is rescaled,
no maximum is needed, and exp2((log2(e) a) z - log2(e) bound) is a single fused multiply-add away from z.

Blocks: tiles are [LANES, GROUP] columns of a row, each thread has GROUP contiguous ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..._gemm.triton_tiles import tile_product
from ..._rows.triton_math import INF, INTERPRETED, NO_COLUMN, finite_reference

LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) in float32

#: Rows of the statistics, and of backward's terms, as in arguments.py; a test compares them.
NEG_PEAK, NEG_MASS, POS_PEAK, POS_MASS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
POS_SUM, NUM_POS, NEG_SLOPE, POS_SLOPE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)


class KeyOptions(NamedTuple):
    """What makes a product's logit, and which keys count for a query: one argument of a kernel.

    A pointer is None where the option is absent; the compiler then drops its code.
    """

    query_label_ptr: Any  # [N] int32
    key_label_ptr: Any  # [M] int32
    exclude_ptr: Any  # [N] int32
    key_bias_ptr: Any  # [M]
    key_scale_ptr: Any  # [M]
    learned_scale_ptr: Any  # 0-dim
    scale: Any
    bound: Any  # of all |u|
    bounded: Any  # constexpr: whether exponentials are relative to the bound


class Columns(NamedTuple):
    """Columns of a tile."""

    index: Any
    whole: Any  # columns that one access covers: all that exist, or in a block the whole groups; None: every one
    edge: Any = None  # in a block: which are in a last group that is not full
    has_edge: Any = None  # whether there is one


class Keys(NamedTuple):
    """The keys of a tile's columns: u = slope z + offset, to the base 2 and relative to the bound if there is one."""

    label: Any
    slope: Any
    offset: Any
    scale: Any  # key_scale


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
def relative_exp_of_product(z, keys, reference2, o):
    """Return exp(u - reference) of products z."""
    u = round_fma(z, keys.slope, keys.offset)
    if o.bounded:
        return fast_exp2(u)
    else:
        return relative_exp(u, reference2)


@triton.jit
def rescale_factor(before, after):
    """Return the factor of sums relative to the maximum ``before`` that makes them relative to the larger ``after``."""
    return fast_exp2(tl.minimum(to_base2(finite_reference(before)) - to_base2(finite_reference(after)), 0.0))


@triton.jit
def load_columns(ptr, columns, other):
    """Load the elements of columns, ``other`` where there is none."""
    ptrs = ptr + columns.index
    if columns.whole is None:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=columns.whole, other=other)
        if columns.edge is not None:
            if columns.has_edge:
                x = tl.where(columns.edge, tl.load(ptrs, mask=columns.edge, other=other), x)
    return x


@triton.jit
def load_keys(o, scale, columns):
    """Load what columns need of their keys."""
    label = load_columns(o.key_label_ptr, columns, 0)
    slope, offset, key_scale = scale, scale * 0.0, 1.0
    if o.bounded:
        slope, offset = scale * LOG2E, -o.bound * LOG2E
    else:
        if o.key_scale_ptr is not None:
            key_scale = load_columns(o.key_scale_ptr, columns, 0.0)
            slope = scale * key_scale
        if o.key_bias_ptr is not None:
            offset = load_columns(o.key_bias_ptr, columns, -INF)
    return Keys(label, slope, offset, key_scale)


@triton.jit
def load_excluded(o, row, inside):
    """Load the columns that rows leave out, -1 for none; also return the smallest and the largest of them."""
    exclude = tl.full(row.shape, -1, tl.int32)
    low, high = NO_COLUMN, -1
    if o.exclude_ptr is not None:
        exclude = tl.load(o.exclude_ptr + row, mask=inside, other=-1)
        low, high = tl.min(tl.where(exclude < 0, NO_COLUMN, exclude), 0), tl.max(exclude, 0)
    return exclude, low, high


@triton.jit
def block_columns(begin, columns, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Return the columns from ``begin`` on in groups, of which whole ones have the widest accesses."""
    group = begin + (tl.arange(0, LANES) * GROUP)[:, None]
    column = group + tl.arange(0, GROUP)[None, :]
    cut = columns % GROUP
    edge = (column >= columns - cut) & (column < columns)
    return Columns(column, group <= columns - GROUP, edge, (cut > 0) & (begin + LANES * GROUP > columns - cut))
