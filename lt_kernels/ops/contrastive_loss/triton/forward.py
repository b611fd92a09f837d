"""The sums over keys that a contrastive loss is made of: tiles of products that are never stored, and blocks in memory.

One softmax over all keys needs a maximum, a sum of exponentials, and of the positives their number and the sum of their
products. Two softmaxes need the maximum and the sum of exponentials of each side.

Tiles: a program visits the tiles of one split for one block of rows, 2 D operations per element. Only tiles with a
column that is left out, and the last one, compare columns at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..._gemm.triton_tiles import inner_products, load_left, split_tiles
from ..._rows.triton_math import INF, INTERPRETED, finite_reference, load_scale
from ...partitioned_logsumexp.triton.forward import add_sums, find_special_tiles
from ...partitioned_logsumexp.triton.keys import (
    block_columns,
    load_columns,
    reference_error,
    rescale_factor,
    to_base2,
)
from .keys import (
    MASS,
    NUM_POS,
    PEAK,
    POS_MASS,
    POS_PEAK,
    POS_SLOPE,
    POS_SUM,
    SLOPE,
    Row,
    exponential,
    load_bias,
    load_row,
    load_tile,
    load_values,
    logits,
    make_keys,
    to_column,
)


class KeySums(NamedTuple):
    """Sums over the columns; peaks are maxima of u."""

    peak: Any  # of all, or of the negatives where there are two softmaxes
    mass: Any  # sum of exp(u - peak)
    slope: Any  # sum of exp(u - peak) z
    pos_peak: Any
    pos_mass: Any
    pos_slope: Any
    pos_sum: Any  # sum of z
    num_pos: Any


@triton.jit
def start_sums(zeros):
    """Return the sums over no columns."""
    nothing = zeros - INF
    return KeySums(nothing, zeros, zeros, nothing, zeros, zeros, zeros, zeros)


@triton.jit
def sums_of_three(x, y, w):
    """Return the sums of rows."""
    if INTERPRETED:  # whose reductions are slow but for the usual ones
        return tl.sum(x, 1), tl.sum(y, 1), tl.sum(w, 1)
    else:  # together: alone the count, which no product is in, would be laid out apart from products
        return tl.reduce((x, y, w), 1, add_sums)


@triton.jit
def join_tile(s, z, row, keys, column, columns, o, MASKED: tl.constexpr, SLOPES: tl.constexpr):
    """Return the sums s with a tile added. MASKED: some elements are left out."""
    same = row.label == keys.label
    if MASKED:
        out = (column >= columns) | (column == row.exclude)
        same = same & ~out
    u = logits(z, same, keys, row.pos_offset, o)
    if MASKED:
        u = tl.where(out, -INF, u)
    if o.two:
        return join_two(s, z, u, same, o, SLOPES)
    else:
        return join_one(s, z, u, same, o, SLOPES)


@triton.jit
def join_one(s, z, u, same, o, SLOPES: tl.constexpr):
    """Return the sums s of one softmax with a tile of logits added."""
    peak, mass, slope, pos_peak, pos_mass, pos_slope, pos_sum, num_pos = s
    if o.bounded:
        e = exponential(u, 0.0, o)
    else:
        before = peak
        peak = tl.maximum(peak, tl.max(u, 1))
        kept = rescale_factor(before, peak)
        mass = mass * kept
        if SLOPES:
            slope = slope * kept
        e = exponential(u, tl.expand_dims(to_base2(finite_reference(peak)), 1), o)
    one = tl.where(same, 1.0, 0.0)
    more_mass, more_sum, more = sums_of_three(e, one * z, one)
    if SLOPES:
        slope += tl.sum(e * z, 1)
    return KeySums(peak, mass + more_mass, slope, pos_peak, pos_mass, pos_slope, pos_sum + more_sum, num_pos + more)


@triton.jit
def join_two(s, z, u, same, o, SLOPES: tl.constexpr):
    """Return the sums s of both softmaxes with a tile of logits added."""
    peak, mass, slope, pos_peak, pos_mass, pos_slope, pos_sum, num_pos = s
    if o.bounded:
        e = exponential(u, 0.0, o)
    else:
        before, pos_before = peak, pos_peak
        peak = tl.maximum(peak, tl.max(tl.where(same, -INF, u), 1))
        pos_peak = tl.maximum(pos_peak, tl.max(tl.where(same, u, -INF), 1))
        kept, pos_kept = rescale_factor(before, peak), rescale_factor(pos_before, pos_peak)
        mass, pos_mass = mass * kept, pos_mass * pos_kept
        if SLOPES:
            slope, pos_slope = slope * kept, pos_slope * pos_kept
        reference = tl.expand_dims(to_base2(finite_reference(peak)), 1)
        pos_reference = tl.expand_dims(to_base2(finite_reference(pos_peak)), 1)
        e = exponential(u, tl.where(same, pos_reference, reference), o)
    one = tl.where(same, 1.0, 0.0)
    more_mass, pos_more, more = sums_of_three(tl.where(same, 0.0, e), one * e, one)
    if SLOPES:
        e = e * z
        slope += tl.sum(tl.where(same, 0.0, e), 1)
        pos_slope += tl.sum(tl.where(same, e, 0.0), 1)
    return KeySums(peak, mass + more_mass, slope, pos_peak, pos_mass + pos_more, pos_slope, pos_sum, num_pos + more)


@triton.jit
def store_sums(out_ptr, size, inside, s, o, SLOPES: tl.constexpr):
    """Store the sums s in rows of [kinds, size]; the peak of no mass is 0."""
    peak, mass, slope, pos_peak, pos_mass, pos_slope, pos_sum, num_pos = s
    factor, pos_factor = 1.0, 1.0
    if o.bounded:
        peak, pos_peak = mass * 0.0 + o.bound, mass * 0.0 + o.bound
    else:
        factor = reference_error(finite_reference(peak))
        if o.two:
            pos_factor = reference_error(finite_reference(pos_peak))
    tl.store(out_ptr + PEAK * size, tl.where(mass == 0.0, 0.0, peak), mask=inside)
    tl.store(out_ptr + MASS * size, mass * factor, mask=inside)
    tl.store(out_ptr + NUM_POS * size, num_pos, mask=inside)
    if o.two:
        tl.store(out_ptr + POS_PEAK * size, tl.where(pos_mass == 0.0, 0.0, pos_peak), mask=inside)
        tl.store(out_ptr + POS_MASS * size, pos_mass * pos_factor, mask=inside)
    else:
        tl.store(out_ptr + POS_SUM * size, pos_sum, mask=inside)
    if SLOPES:
        tl.store(out_ptr + SLOPE * size, slope * factor, mask=inside)
        if o.two:
            tl.store(out_ptr + POS_SLOPE * size, pos_slope * pos_factor, mask=inside)


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def join_keys(
    s, begin, q, row, f, o, columns, scale, MASKED: tl.constexpr, SLOPES: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return the sums s of the queries q with the keys from ``begin`` on added."""
    k = load_tile(f.right_ptr, f.right_stride, begin, columns, f, MASKED, BLOCK_C)
    column = (begin + tl.arange(0, BLOCK_C))[None, :]
    label = load_values(o.key_label_ptr, column, columns, 0, MASKED)
    keys = make_keys(o, scale, label, load_bias(o, column, columns, MASKED))
    return join_tile(s, inner_products(q, k, f), row, keys, column, columns, o, MASKED, SLOPES)


@triton.jit(do_not_specialize=["rows", "columns", "tiles_per_split"])
def contrastive_loss_tiled_forward_kernel(
    f,  # Factors: queries and keys
    o,  # LossOptions
    out_ptr,  # [kinds, splits, N]
    rows,
    columns,
    tiles_per_split,
    RAGGED: tl.constexpr,  # whether the last tile is not full
    APART: tl.constexpr,  # whether tiles with comparisons of columns, if there are any, have a loop of their own
    SLOPES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the sums over the columns of one split."""
    first_row = tl.program_id(0) * BLOCK_N
    index = first_row + tl.arange(0, BLOCK_N)
    q = load_left(f, index, rows)
    own, low, high = load_row(o, index, rows, first_row, first_row + BLOCK_N - 1)
    own = Row(own.label[:, None], own.exclude[:, None], own.pos_offset[:, None])
    scale = load_scale(o.scale, o.learned_scale_ptr)
    s = start_sums(tl.zeros([BLOCK_N], tl.float32))
    split, first, end = split_tiles(tiles_per_split, columns, BLOCK_C)
    MASKED: tl.constexpr = o.exclude_self or o.exclude_ptr is not None or RAGGED
    last, skip, skip_end = end, end, end
    if MASKED:
        last, skip, skip_end = find_special_tiles(first, end, columns, low, high, BLOCK_C)
        if not APART:
            last, skip, skip_end = first, first, first
    if APART or not MASKED:
        for i in range(first, last - (skip_end - skip)):
            tile = tl.where(i < skip, i, i + (skip_end - skip))
            s = join_keys(s, tile * BLOCK_C, q, own, f, o, columns, scale, False, SLOPES, BLOCK_C)
    if MASKED:  # a loop of its own: the registers of comparisons are not those of the loop above
        for i in tl.range(skip, skip_end + (end - last), num_stages=1 if APART else None):
            tile = tl.where(i < skip_end, i, last + (i - skip_end))
            s = join_keys(s, tile * BLOCK_C, q, own, f, o, columns, scale, True, SLOPES, BLOCK_C)
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    store_sums(out_ptr + split * tl.cast(rows, tl.int64) + index, size, index < rows, s, o, SLOPES)


# --- blocks ----------------------------------------------------------------------------------------------------------


@triton.jit
def merge_peaks(peak, mass, slope, o):
    """Return one softmax of a row from its lanes' ones."""
    high = tl.max(peak, 0)
    if not o.bounded:
        kept = rescale_factor(peak, high)
        mass, slope = mass * kept, slope * kept
    return high, tl.sum(mass, 0), tl.sum(slope, 0)


@triton.jit(
    do_not_specialize=["rows", "columns", "first_row", "first_column", "first_split", "splits", "tiles_per_split"]
)
def contrastive_loss_block_forward_kernel(
    z_ptr,  # [n, m], unit stride along m
    o,  # LossOptions
    out_ptr,  # [kinds, splits, N]
    rows,  # N
    columns,  # m
    first_row,  # which one of all the block's first one is, like the next
    first_column,
    first_split,
    splits,  # of all blocks
    tiles_per_split,
    z_stride,
    SLOPES: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute the sums of a row over the columns of one split; each lane has its own until the end."""
    BLOCK: tl.constexpr = LANES * GROUP
    row = first_row + tl.program_id(0)
    exclude = -1
    if o.exclude_self:
        exclude = row
    elif o.exclude_ptr is not None:
        exclude = to_column(tl.load(o.exclude_ptr + row))
    exclude -= first_column
    own = Row(tl.load(o.query_label_ptr + row), exclude, load_pos_offset_of(o, row))
    scale = load_scale(o.scale, o.learned_scale_ptr)
    s = start_sums(tl.zeros([LANES], tl.float32))
    split, first, end = split_tiles(tiles_per_split, columns, BLOCK)
    for tile in range(first, end):
        begin = tile * BLOCK
        own_columns = block_columns(begin, columns, GROUP, LANES)
        z = load_columns(z_ptr + tl.program_id(0).to(tl.int64) * z_stride, own_columns, 0.0).to(tl.float32)
        keys = load_block_keys(o, scale, own_columns, first_column)
        if (begin + BLOCK > columns) | ((exclude < begin + BLOCK) & (exclude >= begin)):
            s = join_tile(s, z, own, keys, own_columns.index, columns, o, True, SLOPES)
        else:
            s = join_tile(s, z, own, keys, own_columns.index, columns, o, False, SLOPES)
    peak, mass, slope = merge_peaks(s.peak, s.mass, s.slope, o)
    pos_peak, pos_mass, pos_slope = merge_peaks(s.pos_peak, s.pos_mass, s.pos_slope, o)
    s = KeySums(peak, mass, slope, pos_peak, pos_mass, pos_slope, tl.sum(s.pos_sum, 0), tl.sum(s.num_pos, 0))
    size = tl.cast(rows, tl.int64)
    store_sums(out_ptr + (first_split + split) * size + row, splits * size, None, s, o, SLOPES)


@triton.jit
def load_pos_offset_of(o, row):
    """Load what the logits of a row's positives have more; 0 without the option."""
    offset = 0.0
    if o.pos_offset_ptr is not None:
        offset = tl.load(o.pos_offset_ptr + row)
    return offset


@triton.jit
def load_block_keys(o, scale, columns, first_column):
    """Load what the columns of a block need of their keys."""
    label = load_columns(o.key_label_ptr + first_column, columns, 0)
    bias = 0.0
    if o.key_bias_ptr is not None:
        bias = load_columns(o.key_bias_ptr + first_column, columns, -INF)
    return make_keys(o, scale, label, bias)
