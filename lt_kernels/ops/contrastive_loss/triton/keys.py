"""What the kernels of a contrastive loss read of a row and of a tile of keys, and the logits made of it.

With a = scale * learned_scale, a product z_ij = <q_i, k_j> has the logit u_ij = a z_ij + key_bias_j, and pos_offset_i
more where the labels are the same: fused multiply-adds written once, so that forward and backward agree to the last
bit. If a small number bounds all |u| (``bounded``), exponentials are relative to it, and one multiply-add away from z.

Labels are compared in the dtype that they have. Where row i leaves out column i (``exclude_self``), only tiles that
cross the diagonal compare columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..._rows.triton_math import INF, NO_COLUMN
from ...partitioned_logsumexp.triton.keys import LOG2E, fast_exp2, relative_exp, round_fma

#: Rows of what a sweep leaves of each split; *_SLOPE only where the scale learns.
PEAK, MASS, NUM_POS, POS_SUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
POS_PEAK, POS_MASS = tl.constexpr(3), tl.constexpr(4)  # of two softmaxes, without POS_SUM
SLOPE, POS_SLOPE = tl.constexpr(5), tl.constexpr(6)
N_SUMS, N_SLOPES = 5, 2
#: Rows of backward's terms: references times log2(e), what exponentials are multiplied by, what positives have more.
REFERENCE, FACTOR, PULL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
POS_REFERENCE, POS_FACTOR = tl.constexpr(2), tl.constexpr(3)  # of two softmaxes, without PULL
#: ... and the gradients of the row's other inputs, all for an upstream gradient of 1.
OF_EXTRA, OF_PULLED, OF_SCALE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
N_TERMS = 7


class LossOptions(NamedTuple):
    """What makes a product's logit, and which keys count for a query: one argument of a kernel.

    A pointer is None where the option is absent; the compiler then drops its code.
    """

    query_label_ptr: Any  # [N] integers
    key_label_ptr: Any  # [M] of the same dtype
    exclude_ptr: Any  # [N] integers, the column that a row leaves out; -1: none
    key_bias_ptr: Any  # [M]
    pos_offset_ptr: Any  # [N]
    learned_scale_ptr: Any  # 0-dim
    scale: Any
    bound: Any  # of all |u|
    bounded: Any  # constexpr, like those below: whether exponentials are relative to the bound
    exclude_self: Any
    two: Any  # whether positives and negatives have a softmax each


class Row(NamedTuple):
    """What rows compare with columns."""

    label: Any
    exclude: Any  # the column that the row leaves out
    pos_offset: Any


class Keys(NamedTuple):
    """The keys of a tile's columns: u = slope z + offset, to the base 2 and relative to the bound if there is one."""

    label: Any
    slope: Any
    offset: Any


@triton.jit
def load_values(ptr, index, size, other, RAGGED: tl.constexpr):
    """Load ptr[index]; ``other`` where there is none. RAGGED: this can happen."""
    if RAGGED:
        return tl.load(ptr + index, mask=index < size, other=other)
    else:
        return tl.load(ptr + index)


@triton.jit
def to_column(index):
    """Return a column's number in int32; -1 for what is none."""
    return tl.where((index >= 0) & (index < NO_COLUMN), index, -1).to(tl.int32)


@triton.jit
def load_row(o, row, rows, low, high):
    """Load what rows need; also return the smallest and the largest column that they leave out.

    low, high: the smallest and the largest row.
    """
    label = load_values(o.query_label_ptr, row, rows, 0, True)
    exclude = row
    if o.exclude_ptr is not None:
        exclude = to_column(load_values(o.exclude_ptr, row, rows, -1, True))
        low, high = tl.min(tl.where(exclude < 0, NO_COLUMN, exclude), 0), tl.max(exclude, 0)
    elif not o.exclude_self:
        exclude, low, high = row * 0 - 1, NO_COLUMN, -1
    return Row(label, exclude, load_pos_offset(o, row, rows, True)), low, high


@triton.jit
def load_pos_offset(o, row, rows, RAGGED: tl.constexpr):
    """Load what the logits of the rows' positives have more; 0 without the option."""
    offset = row * 0.0
    if o.pos_offset_ptr is not None:
        offset = load_values(o.pos_offset_ptr, row, rows, 0.0, RAGGED)
    return offset


@triton.jit
def load_bias(o, column, columns, RAGGED: tl.constexpr):
    """Load the bias of keys; 0 without the option."""
    bias = column * 0.0
    if o.key_bias_ptr is not None:
        bias = load_values(o.key_bias_ptr, column, columns, -INF, RAGGED)
    return bias


@triton.jit
def make_keys(o, scale, label, bias):
    """Return what a tile needs of its keys."""
    slope, offset = scale, scale * 0.0
    if o.bounded:
        slope, offset = scale * LOG2E, -o.bound * LOG2E
    elif o.key_bias_ptr is not None:
        offset = bias
    return Keys(label, slope, offset)


@triton.jit
def logits(z, same, keys, pos_offset, o):
    """Return the logits of products; where there is a bound, to the base 2 and relative to it.

    pos_offset: of the rows, with a dimension for the columns.
    """
    u = round_fma(z, keys.slope, keys.offset)
    if o.pos_offset_ptr is not None:
        u = tl.where(same, u + pos_offset, u)
    return u


@triton.jit
def exponential(u, reference2, o):
    """Return exp(u - reference) of ``logits``."""
    if o.bounded:
        return fast_exp2(u)
    else:
        return relative_exp(u, reference2)


@triton.jit
def load_tile(ptr, stride, begin, size, f, RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """Load the vectors from ``begin`` on of a [size, D] matrix, 0 where there is none. RAGGED: this can happen."""
    lane, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, f.block_d)[None, :]
    ptrs = ptr + begin.to(tl.int64) * stride + (lane.to(tl.int64) * stride + d)
    if RAGGED:
        mask = begin + lane < size
        if not f.full:
            mask = mask & (d < f.width)
        return tl.load(ptrs, mask=mask, other=0.0)
    elif f.full:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=d < f.width, other=0.0)
