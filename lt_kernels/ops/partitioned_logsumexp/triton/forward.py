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
from ..._gemm.triton_tiles import load_vectors, tile_product
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
    block_columns,
    fast_exp2,
    load_excluded,
    load_keys,
    load_wide,
    load_wide_keys,
    reference_error,
    relative_exp,
    rescale_factor,
    round_fma,
    to_base2,
)
from .launch import BLOCK_TOGETHER, MERGED_ROWS, MOST_SPLITS, block_arguments, block_launch, tile_arguments


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


# --- statistics ------------------------------------------------------------------------------------------------------


@triton.jit
def add_sums(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def positive_sums(same, x, y, AXIS: tl.constexpr):
    """Return sums of x and of y over the positive columns along AXIS, and the number of these."""
    one = tl.where(same, 1.0, 0.0)
    x, y = one * x, one * y
    if INTERPRETED:  # whose reductions are slow but for the usual ones
        return tl.sum(x, AXIS), tl.sum(y, AXIS), tl.sum(one, AXIS)
    else:  # together: alone the count, which no product is in, would be laid out apart from products
        return tl.reduce((x, y, one), AXIS, add_sums)


@triton.jit
def split_sides(label, key_label, column, columns, exclude, MASKED: tl.constexpr):
    """Return which elements are positive, and which count for nothing."""
    same = label == key_label
    out = same
    if MASKED:
        out = (column >= columns) | (column == exclude)
        same = same & ~out
    return same, out


@triton.jit
def join_tile(
    s, z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, AXIS: tl.constexpr,
    MASKED: tl.constexpr, CONSTANT: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Return both sides' statistics s with a tile added along AXIS.

    zero: 0, but the compiler does not know: it compares labels again rather than keep a tile of comparisons in
    registers. MASKED: some elements are left out.
    """
    neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, pos_sum, num_pos = s
    same, out = split_sides(label, key_label, column, columns, exclude, MASKED)
    u = round_fma(z, slope, offset)
    if MASKED:
        u = tl.where(out, -INF, u)
    if CONSTANT:
        e = fast_exp2(u)
    else:
        neg_before, pos_before = neg_peak, pos_peak
        neg_peak = tl.maximum(neg_peak, tl.max(tl.where(same, -INF, u), AXIS))
        pos_peak = tl.maximum(pos_peak, tl.max(tl.where(same, u, -INF), AXIS))
        neg_kept, pos_kept = rescale_factor(neg_before, neg_peak), rescale_factor(pos_before, pos_peak)
        neg_mass, pos_mass = neg_mass * neg_kept, pos_mass * pos_kept
        if SLOPES:
            neg_slope, pos_slope = neg_slope * neg_kept, pos_slope * pos_kept
        neg_reference = tl.expand_dims(to_base2(finite_reference(neg_peak)), AXIS)
        pos_reference = tl.expand_dims(to_base2(finite_reference(pos_peak)), AXIS)
        same, _ = split_sides(label + zero, key_label, column, columns, exclude + zero, MASKED)
        e = relative_exp(u, tl.where(same, pos_reference, neg_reference))
    more_mass, more_sum, more = positive_sums(same, e, z, AXIS)
    neg_mass, pos_mass = neg_mass + tl.sum(tl.where(same, 0.0, e), AXIS), pos_mass + more_mass
    pos_sum, num_pos = pos_sum + more_sum, num_pos + more
    if SLOPES:
        e = e * (key_scale * z)
        neg_slope += tl.sum(tl.where(same, 0.0, e), AXIS)
        pos_slope += tl.sum(tl.where(same, e, 0.0), AXIS)
    return KeyStatistics(neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, pos_sum, num_pos)


@triton.jit
def store_statistics(out_ptr, size, inside, s, CONSTANT: tl.constexpr, SLOPES: tl.constexpr):
    """Store the statistics s in rows of [6 or 8, size]; the peak of no mass is 0."""
    neg_peak, pos_peak, neg_mass, pos_mass, neg_slope, pos_slope, pos_sum, num_pos = s
    if not CONSTANT:
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
    s, begin, q, label, exclude, key_ptr, key_label_ptr, key_bias_ptr, key_scale_ptr, columns, width, key_stride, scale,
    bound, zero, MASKED: tl.constexpr, CONSTANT: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the statistics s of the queries q with the keys from ``begin`` on added."""
    column = begin + tl.arange(0, BLOCK_C)
    k = load_vectors(key_ptr, column, columns, width, key_stride, FULL, BLOCK_D)
    column = column[None, :]
    real = None
    if MASKED:
        real = column < columns
    key_label, slope, offset, key_scale = load_keys(
        key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, column, real, CONSTANT
    )
    z = tile_product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_C], tl.float32), PRECISION)
    return join_tile(
        s, z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, 1, MASKED, CONSTANT, SLOPES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "tiles_per_split"])
def partitioned_logsumexp_tiled_forward_kernel(
    query_ptr,  # [N, D], unit stride along D
    key_ptr,  # [M, D], unit stride along D
    query_label_ptr,  # [N] int32
    key_label_ptr,  # [M] int32
    exclude_ptr,  # [N] int32
    key_bias_ptr,  # [M]
    key_scale_ptr,  # [M]
    learned_scale_ptr,  # 0-dim
    out_ptr,  # [6 or 8, splits, N]
    rows,
    columns,
    width,
    tiles_per_split,
    query_stride,
    key_stride,
    scale,
    bound,
    RAGGED: tl.constexpr,  # whether the last tile is not full
    APART: tl.constexpr,  # whether tiles with comparisons of columns, if there are any, have a loop of their own
    CONSTANT: tl.constexpr,
    SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the statistics of the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    q = load_vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
    label = tl.load(query_label_ptr + row, mask=inside, other=0)[:, None]
    exclude, low, high = load_excluded(exclude_ptr, row, inside)
    exclude = exclude[:, None]
    scale = load_scale(scale, learned_scale_ptr)
    zero = rows >> 31
    peak, zeros = tl.full([BLOCK_N], -INF, tl.float32), tl.zeros([BLOCK_N], tl.float32)
    s = KeyStatistics(peak, peak, zeros, zeros, zeros, zeros, zeros, zeros)
    split = tl.program_id(1)
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tl.cdiv(columns, BLOCK_C))
    MASKED: tl.constexpr = exclude_ptr is not None or RAGGED
    last, skip, skip_end = end, end, end
    if MASKED:
        last, skip, skip_end = find_special_tiles(first, end, columns, low, high, BLOCK_C)
        if not APART:
            last, skip, skip_end = first, first, first
    if APART or not MASKED:
        for index in range(first, last - (skip_end - skip)):
            tile = tl.where(index < skip, index, index + (skip_end - skip))
            s = join_keys(
                s, tile * BLOCK_C, q, label, exclude, key_ptr, key_label_ptr, key_bias_ptr, key_scale_ptr, columns,
                width, key_stride, scale, bound, zero, False, CONSTANT, SLOPES, PRECISION, FULL, BLOCK_C, BLOCK_D,
            )  # fmt: skip
    if MASKED:  # a loop of its own: the registers of comparisons are not those of the loop above
        for index in tl.range(skip, skip_end + (end - last), num_stages=1 if APART else None):
            tile = tl.where(index < skip_end, index, last + (index - skip_end))
            s = join_keys(
                s, tile * BLOCK_C, q, label, exclude, key_ptr, key_label_ptr, key_bias_ptr, key_scale_ptr, columns,
                width, key_stride, scale, bound, zero, True, CONSTANT, SLOPES, PRECISION, FULL, BLOCK_C, BLOCK_D,
            )  # fmt: skip
    if CONSTANT:
        bounds = zeros + bound
        s = KeyStatistics(bounds, bounds, s.neg_mass, s.pos_mass, s.neg_slope, s.pos_slope, s.pos_sum, s.num_pos)
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    store_statistics(out_ptr + split * tl.cast(rows, tl.int64) + row, size, inside, s, CONSTANT, SLOPES)


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
    query_label_ptr,  # [n] int32
    key_label_ptr,  # [m] int32
    exclude_ptr,  # [n] int32
    key_bias_ptr,  # [m]
    key_scale_ptr,  # [m]
    learned_scale_ptr,  # 0-dim
    out_ptr,  # [6 or 8, splits, n]
    rows,
    columns,
    first_column,
    tiles_per_split,
    z_stride,
    scale,
    SLOPES: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute the statistics of a row over the columns of one split; each lane has its own until the end."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(query_label_ptr + row)
    exclude = -1
    if exclude_ptr is not None:
        exclude = tl.load(exclude_ptr + row)
    exclude -= first_column
    scale = load_scale(scale, learned_scale_ptr)
    zero = rows >> 31
    zeros = tl.zeros([LANES], tl.float32)
    s = KeyStatistics(zeros - INF, zeros - INF, zeros, zeros, zeros, zeros, zeros, zeros)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(columns, LANES * GROUP))):
        begin = tile * (LANES * GROUP)
        column, whole, edge, has_edge = block_columns(begin, columns, GROUP, LANES)
        z = load_wide(z_ptr + row * z_stride + column, whole, edge, has_edge, 0.0).to(tl.float32)
        key_label, slope, offset, key_scale = load_wide_keys(
            key_label_ptr, key_scale_ptr, key_bias_ptr, scale, column, whole, edge, has_edge
        )
        if (begin + LANES * GROUP > columns) | ((exclude < begin + LANES * GROUP) & (exclude >= begin)):
            s = join_tile(
                s, z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, 1, True, False,
                SLOPES,
            )  # fmt: skip
        else:
            s = join_tile(
                s, z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, 1, False, False,
                SLOPES,
            )  # fmt: skip
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
    kinds = N_STATISTICS + N_SLOPES * with_slopes
    if n == 0 or m == 0:
        return block.z.new_zeros((kinds, n), dtype=torch.float32)
    with torch.cuda.device_of(block.z):
        constants = block_launch(m)
        tiles = triton.cdiv(m, constants["LANES"] * constants["GROUP"])
        per_split = gemm.tiles_per_split(n, tiles, BLOCK_TOGETHER, MOST_SPLITS)
        splits = triton.cdiv(tiles, per_split)
        partial = block.z.new_empty((kinds, splits, n), dtype=torch.float32)
        arguments = block_arguments(block) | {"out_ptr": partial, "tiles_per_split": per_split, "SLOPES": with_slopes}
        launch_with(partitioned_logsumexp_block_forward_kernel, (n, splits), arguments, **constants)
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
    kinds = N_STATISTICS + N_SLOPES * with_slopes
    if n == 0 or m == 0:
        return a.query.new_zeros((kinds, n), dtype=torch.float32)
    with torch.cuda.device_of(a.query):
        arguments, launches = tile_arguments(a)
        launch = launches.forward_bounded if arguments["CONSTANT"] else launches.forward
        blocks, tiles = triton.cdiv(n, launch.block_n), triton.cdiv(m, launch.block_c)
        per_split = gemm.tiles_per_split(blocks, tiles, launch.together, MOST_SPLITS)
        partial = a.query.new_empty((kinds, triton.cdiv(tiles, per_split), n), dtype=torch.float32)
        arguments |= {"out_ptr": partial, "tiles_per_split": per_split, "SLOPES": with_slopes}
        arguments["RAGGED"] = m % launch.block_c != 0
        # products without tensor cores are long code, and twice that would spill
        arguments["APART"] = a.query.element_size() == 2 or arguments["PRECISION"] == "tf32"
        launch_with(
            partitioned_logsumexp_tiled_forward_kernel, (blocks, partial.shape[1]), arguments, **launch.constants
        )
        return merge_statistics(partial)
