"""Forward kernels of the partitioned log-sum-exp: tiles of products that are never stored, and blocks in memory.

Tiles: a program visits the tiles of one split for one block of rows, 2 D operations per element. A block knows the
smallest and the largest of the columns that its rows leave out. Only tiles between these, and the last one, compare
columns at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gemm import launch as gemm
from ..._gemm.triton_tiles import inner_products, load_left, load_right, split_tiles
from ..._rows.triton_math import INF, INTERPRETED, finite_reference, load_scale
from ..._triton import launch_with
from ..arguments import N_SLOPES, N_STATISTICS, Arguments, Block
from .keys import (
    LOG2E,
    NEG_MASS,
    NEG_PEAK,
    NEG_SLOPE,
    NUM_POS,
    POS_MASS,
    POS_PEAK,
    POS_SLOPE,
    POS_SUM,
    Columns,
    block_columns,
    fast_exp2,
    load_columns,
    load_excluded,
    load_keys,
    reference_error,
    relative_exp,
    rescale_factor,
    round_fma,
    to_base2,
)
from .launch import (
    BLOCK_TOGETHER,
    MERGED_ROWS,
    MOST_SPLITS,
    block_arguments,
    block_launch,
    bounds_exponents,
    tile_arguments,
)


class KeyStatistics(NamedTuple):
    """Sums over the columns of both sides; peaks are maxima of u."""

    neg_peak: Any
    pos_peak: Any
    neg_mass: Any  # sum of exp(u - peak)
    pos_mass: Any
    neg_slope: Any  # sum of exp(u - peak) key_scale z
    pos_slope: Any
    pos_sum: Any  # sum of z
    num_pos: Any


class RowLabel(NamedTuple):
    """What rows compare with columns."""

    label: Any
    exclude: Any  # the column that the row leaves out


# --- statistics ------------------------------------------------------------------------------------------------------


@triton.jit
def add_sums(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def positive_sums(same, x, y):
    """Return a row's sums of x and of y over the positive columns, and the number of these."""
    one = tl.where(same, 1.0, 0.0)
    x, y = one * x, one * y
    if INTERPRETED:  # whose reductions are slow but for the usual ones
        return tl.sum(x, 1), tl.sum(y, 1), tl.sum(one, 1)
    else:  # together: alone the count, which no product is in, would be laid out apart from products
        return tl.reduce((x, y, one), 1, add_sums)


@triton.jit
def split_sides(row, keys, column, columns, MASKED: tl.constexpr):
    """Return which elements are positive, and which count for nothing."""
    same = row.label == keys.label
    out = same
    if MASKED:
        out = (column >= columns) | (column == row.exclude)
        same = same & ~out
    return same, out


@triton.jit
def join_tile(s, z, row, keys, column, columns, o, zero, MASKED: tl.constexpr, SLOPES: tl.constexpr):
    """Return both sides' statistics s with a tile added.

    zero: 0, but the compiler does not know: it compares labels again rather than keep a tile of comparisons in
    registers. MASKED: some elements are left out.
    """
    neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, pos_sum, num_pos = s
    same, out = split_sides(row, keys, column, columns, MASKED)
    u = round_fma(z, keys.slope, keys.offset)
    if MASKED:
        u = tl.where(out, -INF, u)
    if o.bounded:
        e = fast_exp2(u)
    else:
        neg_before, pos_before = neg_peak, pos_peak
        neg_peak = tl.maximum(neg_peak, tl.max(tl.where(same, -INF, u), 1))
        pos_peak = tl.maximum(pos_peak, tl.max(tl.where(same, u, -INF), 1))
        neg_kept, pos_kept = rescale_factor(neg_before, neg_peak), rescale_factor(pos_before, pos_peak)
        neg_mass, pos_mass = neg_mass * neg_kept, pos_mass * pos_kept
        if SLOPES:
            neg_slope, pos_slope = neg_slope * neg_kept, pos_slope * pos_kept
        neg_reference = to_base2(finite_reference(neg_peak))[:, None]
        pos_reference = to_base2(finite_reference(pos_peak))[:, None]
        again = RowLabel(row.label + zero, row.exclude + zero)
        same, _ = split_sides(again, keys, column, columns, MASKED)
        e = relative_exp(u, tl.where(same, pos_reference, neg_reference))
    more_mass, more_sum, more = positive_sums(same, e, z)
    neg_mass, pos_mass = neg_mass + tl.sum(tl.where(same, 0.0, e), 1), pos_mass + more_mass
    pos_sum, num_pos = pos_sum + more_sum, num_pos + more
    if SLOPES:
        e = e * (keys.scale * z)
        neg_slope += tl.sum(tl.where(same, 0.0, e), 1)
        pos_slope += tl.sum(tl.where(same, e, 0.0), 1)
    return KeyStatistics(neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, pos_sum, num_pos)


@triton.jit
def store_statistics(out_ptr, size, inside, s, bounded: tl.constexpr, SLOPES: tl.constexpr):
    """Store the statistics s in rows of [6 or 8, size]; the peak of no mass is 0."""
    neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, pos_sum, num_pos = s
    if not bounded:
        neg_factor, pos_factor = (
            reference_error(finite_reference(neg_peak)),
            reference_error(finite_reference(pos_peak)),
        )
        neg_mass, pos_mass, neg_slope, pos_slope = (
            neg_mass * neg_factor, pos_mass * pos_factor, neg_slope * neg_factor, pos_slope * pos_factor
        )  # fmt: skip
    tl.store(out_ptr + NEG_PEAK * size, tl.where(neg_mass == 0.0, 0.0, neg_peak), mask=inside)
    tl.store(out_ptr + NEG_MASS * size, neg_mass, mask=inside)
    tl.store(out_ptr + POS_PEAK * size, tl.where(pos_mass == 0.0, 0.0, pos_peak), mask=inside)
    tl.store(out_ptr + POS_MASS * size, pos_mass, mask=inside)
    tl.store(out_ptr + POS_SUM * size, pos_sum, mask=inside)
    tl.store(out_ptr + NUM_POS * size, num_pos, mask=inside)
    if SLOPES:
        tl.store(out_ptr + NEG_SLOPE * size, neg_slope, mask=inside)
        tl.store(out_ptr + POS_SLOPE * size, pos_slope, mask=inside)


@triton.jit
def merge_side(from_ptr, size, mask, PEAK: tl.constexpr, MASS: tl.constexpr, SLOPE: tl.constexpr, SLOPES: tl.constexpr):
    """Return one side's statistics from the splits' ones, [SPLITS, BLOCK]."""
    mass = tl.load(from_ptr + MASS * size, mask=mask, other=0.0)
    peak = tl.where(mass == 0.0, -INF, tl.load(from_ptr + PEAK * size, mask=mask, other=0.0))
    high = tl.max(peak, 0)
    kept = fast_exp2(tl.minimum(finite_reference(peak) - finite_reference(high)[None, :], 0.0) * LOG2E)
    slope = tl.zeros_like(high)
    if SLOPES:
        slope = tl.sum(kept * tl.load(from_ptr + SLOPE * size, mask=mask, other=0.0), 0)
    return high, tl.sum(kept * mass, 0), slope


@triton.jit(do_not_specialize=["rows", "splits"])
def partitioned_logsumexp_merge_kernel(
    partial_ptr,  # [6 or 8, splits, N]
    out_ptr,  # [6 or 8, N]
    rows,
    splits,
    SLOPES: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, splits at least
    BLOCK: tl.constexpr,
):
    """Join the splits' statistics, all of a block of rows at once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)[:, None]
    inside = row < rows
    mask = (split < splits) & inside[None, :]
    size = splits * tl.cast(rows, tl.int64)
    from_ptr = partial_ptr + split * tl.cast(rows, tl.int64) + row[None, :]
    neg_peak, neg_mass, neg_slope = merge_side(from_ptr, size, mask, NEG_PEAK, NEG_MASS, NEG_SLOPE, SLOPES)
    pos_peak, pos_mass, pos_slope = merge_side(from_ptr, size, mask, POS_PEAK, POS_MASS, POS_SLOPE, SLOPES)
    pos_sum = tl.sum(tl.load(from_ptr + POS_SUM * size, mask=mask, other=0.0), 0)
    num_pos = tl.sum(tl.load(from_ptr + NUM_POS * size, mask=mask, other=0.0), 0)
    s = KeyStatistics(neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, pos_sum, num_pos)
    store_statistics(out_ptr + row, tl.cast(rows, tl.int64), inside, s, True, SLOPES)


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def find_special_tiles(first, end, columns, low, high, BLOCK_C: tl.constexpr):
    """Return where the full tiles of ``first`` to ``end`` end, and between which tiles columns are left out."""
    last = tl.minimum(end, columns // BLOCK_C)
    skip = tl.minimum(tl.maximum(low // BLOCK_C, first), last)
    return last, skip, tl.maximum(tl.minimum(high // BLOCK_C + 1, last), skip)


@triton.jit
def join_keys(
    s, begin, q, row, f, o, columns, scale, zero, MASKED: tl.constexpr, SLOPES: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return the statistics s of the queries q with the keys from ``begin`` on added."""
    column = begin + tl.arange(0, BLOCK_C)
    k = load_right(f, column, columns)
    column = column[None, :]
    real = None
    if MASKED:
        real = column < columns
    keys = load_keys(o, scale, Columns(column, real))
    return join_tile(s, inner_products(q, k, f), row, keys, column, columns, o, zero, MASKED, SLOPES)


@triton.jit(do_not_specialize=["rows", "columns", "tiles_per_split"])
def partitioned_logsumexp_tiled_forward_kernel(
    f,  # Factors: queries and keys
    o,  # KeyOptions
    out_ptr,  # [6 or 8, splits, N]
    rows,
    columns,
    tiles_per_split,
    RAGGED: tl.constexpr,  # whether the last tile is not full
    APART: tl.constexpr,  # whether tiles with comparisons of columns, if there are any, have a loop of their own
    SLOPES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the statistics of the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    q = load_left(f, row, rows)
    label = tl.load(o.query_label_ptr + row, mask=inside, other=0)[:, None]
    exclude, low, high = load_excluded(o, row, inside)
    own = RowLabel(label, exclude[:, None])
    scale = load_scale(o.scale, o.learned_scale_ptr)
    zero = rows >> 31
    peak, zeros = tl.full([BLOCK_N], -INF, tl.float32), tl.zeros([BLOCK_N], tl.float32)
    s = KeyStatistics(peak, peak, zeros, zeros, zeros, zeros, zeros, zeros)
    split, first, end = split_tiles(tiles_per_split, columns, BLOCK_C)
    MASKED: tl.constexpr = o.exclude_ptr is not None or RAGGED
    last, skip, skip_end = end, end, end
    if MASKED:
        last, skip, skip_end = find_special_tiles(first, end, columns, low, high, BLOCK_C)
        if not APART:
            last, skip, skip_end = first, first, first
    if APART or not MASKED:
        for index in range(first, last - (skip_end - skip)):
            tile = tl.where(index < skip, index, index + (skip_end - skip))
            s = join_keys(s, tile * BLOCK_C, q, own, f, o, columns, scale, zero, False, SLOPES, BLOCK_C)
    if MASKED:  # a loop of its own: the registers of comparisons are not those of the loop above
        for index in tl.range(skip, skip_end + (end - last), num_stages=1 if APART else None):
            tile = tl.where(index < skip_end, index, last + (index - skip_end))
            s = join_keys(s, tile * BLOCK_C, q, own, f, o, columns, scale, zero, True, SLOPES, BLOCK_C)
    if o.bounded:
        bounds = zeros + o.bound
        s = KeyStatistics(bounds, bounds, s.neg_mass, s.pos_mass, s.neg_slope, s.pos_slope, s.pos_sum, s.num_pos)
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    store_statistics(out_ptr + split * tl.cast(rows, tl.int64) + row, size, inside, s, o.bounded, SLOPES)


# --- blocks ----------------------------------------------------------------------------------------------------------


@triton.jit
def merge_lanes(peak, mass, slope):
    """Return one side's statistics of a row from its lanes' ones."""
    high = tl.max(peak, 0)
    kept = rescale_factor(peak, high)
    return high, tl.sum(mass * kept, 0), tl.sum(slope * kept, 0)


@triton.jit(do_not_specialize=["rows", "columns", "first_column", "tiles_per_split"])
def partitioned_logsumexp_block_forward_kernel(
    z_ptr,  # [n, m], unit stride along m
    o,  # KeyOptions
    out_ptr,  # [6 or 8, splits, n]
    rows,
    columns,
    first_column,
    tiles_per_split,
    z_stride,
    SLOPES: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute the statistics of a row over the columns of one split; each lane has its own until the end."""
    BLOCK: tl.constexpr = LANES * GROUP
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(o.query_label_ptr + row)
    exclude = -1
    if o.exclude_ptr is not None:
        exclude = tl.load(o.exclude_ptr + row)
    exclude -= first_column
    own = RowLabel(label, exclude)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    zero = rows >> 31
    zeros = tl.zeros([LANES], tl.float32)
    s = KeyStatistics(zeros - INF, zeros - INF, zeros, zeros, zeros, zeros, zeros, zeros)
    split, first, end = split_tiles(tiles_per_split, columns, BLOCK)
    for tile in range(first, end):
        begin = tile * BLOCK
        tile_columns = block_columns(begin, columns, GROUP, LANES)
        z = load_columns(z_ptr + row * z_stride, tile_columns, 0.0).to(tl.float32)
        keys = load_keys(o, scale, tile_columns)
        if (begin + BLOCK > columns) | ((exclude < begin + BLOCK) & (exclude >= begin)):
            s = join_tile(s, z, own, keys, tile_columns.index, columns, o, zero, True, SLOPES)
        else:
            s = join_tile(s, z, own, keys, tile_columns.index, columns, o, zero, False, SLOPES)
    neg_peak, neg_mass, neg_slope = merge_lanes(s.neg_peak, s.neg_mass, s.neg_slope)
    pos_peak, pos_mass, pos_slope = merge_lanes(s.pos_peak, s.pos_mass, s.pos_slope)
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    row_ptr = out_ptr + split * tl.cast(rows, tl.int64) + row
    s = KeyStatistics(
        neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, tl.sum(s.pos_sum, 0), tl.sum(s.num_pos, 0)
    )
    store_statistics(row_ptr, size, None, s, False, SLOPES)


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(block: Block, with_slopes: bool) -> Tensor:
    """Return the statistics of a block's columns [6, n], or [8, n] with_slopes."""
    n, m = block.z.shape
    if n == 0 or m == 0:
        return block.z.new_zeros((N_STATISTICS + N_SLOPES * with_slopes, n), dtype=torch.float32)
    with torch.cuda.device_of(block.z):
        constants = block_launch(m)
        tiles = triton.cdiv(m, constants["LANES"] * constants["GROUP"])
        cut = gemm.cut(n, tiles, BLOCK_TOGETHER, MOST_SPLITS)
        return _statistics(
            partitioned_logsumexp_block_forward_kernel, cut, block_arguments(block), with_slopes, block.z, **constants
        )


def _statistics(
    kernel: Any, cut: gemm.Cut, arguments: dict[str, Any], with_slopes: bool, like: Tensor, **constants: Any
) -> Tensor:
    """Return the statistics [6, n], or [8, n] with_slopes, from a kernel's ones of each split."""
    shape = (N_STATISTICS + N_SLOPES * with_slopes, cut.splits, arguments["rows"])
    partial = like.new_empty(shape, dtype=torch.float32)
    arguments |= {"out_ptr": partial, "tiles_per_split": cut.per_split, "SLOPES": with_slopes}
    launch_with(kernel, cut.grid, arguments, **constants)
    return merge_statistics(partial)


def merge_statistics(partial: Tensor) -> Tensor:
    """Return the statistics [kinds, n] of those of splits [kinds, splits, n]."""
    kinds, splits, n = partial.shape
    if splits == 1:
        return partial[:, 0]
    out = partial.new_empty((kinds, n))
    arguments = {"partial_ptr": partial, "out_ptr": out, "rows": n, "splits": splits, "SLOPES": kinds > N_STATISTICS}
    constants = {"SPLITS": triton.next_power_of_2(splits), "BLOCK": MERGED_ROWS, "num_warps": 4}
    launch_with(partitioned_logsumexp_merge_kernel, (triton.cdiv(n, MERGED_ROWS),), arguments, **constants)
    return out


def tiled_forward(a: Arguments, with_slopes: bool) -> Tensor:
    """Return the statistics of all columns [6, N], or [8, N] with_slopes."""
    n, m = a.query.shape[0], a.keys.shape[0]
    if n == 0 or m == 0:
        return a.query.new_zeros((N_STATISTICS + N_SLOPES * with_slopes, n), dtype=torch.float32)
    with torch.cuda.device_of(a.query):
        arguments, launches = tile_arguments(a)
        launch = launches.forward_bounded if bounds_exponents(a) else launches.forward
        cut = launch.along_rows(n, m, MOST_SPLITS)
        # products without tensor cores are long code, and twice that would spill
        apart = a.query.element_size() == 2 or arguments["f"].precision.value == "tf32"
        return _statistics(
            partitioned_logsumexp_tiled_forward_kernel, cut, arguments, with_slopes, a.query,
            RAGGED=m % launch.block_c != 0, APART=apart, **launch.constants,
        )  # fmt: skip
