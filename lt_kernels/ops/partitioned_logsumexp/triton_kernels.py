# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disable-error-code="assignment, var-annotated"
"""Kernels of the partitioned log-sum-exp: similarities in memory (blocks), or computed tile by tile and never stored.

With a = scale * learned_scale the logits are u_ij = (a key_scale_j) z_ij + key_bias_j, one fused multiply-add, and an
exponential relative to a row's reference r is exp2(log2(e) u - log2(e) r), one more. Both are written once, for every
kernel: forward and backward agree to the last bit. A column is positive for a row of the same label and negative
for the others, so that one exponential serves both sides: exp(u - (r of the positive or of the negative ones)).

Where all |u| are bounded by a small number (CONSTANT), that is the reference of every row and of both sides: nothing is
rescaled, no maximum is needed, and exp2((log2(e) a) z - log2(e) bound) is a single fused multiply-add away from z.

Tiles: a program visits the tiles of one split for one block of rows (or of keys). Of the columns that rows leave out a
block knows the smallest and the largest, so that only tiles between these, and the last one, compare columns at all.

    kernel              operations per element
    _tiled_forward      2 D
    _grad_query         4 D
    _grad_key           4 D
    _grad_both          4 D    the queries are the keys: dX_i = a sum_j (dS_ij + dS_ji) x_j from one product per tile

Blocks: tiles are [LANES, GROUP] columns of a row, each thread has GROUP contiguous ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..linear_margin_cross_entropy.triton_kernels import _product, _vectors
from ..margin_cross_entropy.triton_math import (
    _INF,
    _INTERPRETED,
    _NO_COLUMN,
    _exp,
    _full_scale,
    _reference,
)

_LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) in float32

#: Rows of the statistics, and of backward's terms, as in arguments.py; a test compares them.
_NEG_PEAK, _NEG_MASS, _POS_PEAK, _POS_MASS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_POS_SUM, _NUM_POS, _NEG_SLOPE, _POS_SLOPE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)

# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _added_product(a, b, sum, PRECISION: tl.constexpr):
    """a b + sum. In float32 a tile's product is added as a whole: roundings of many tiles' terms would add up."""
    if a.dtype == tl.float32:
        return sum + _product(a, b, tl.zeros(sum.shape, tl.float32), PRECISION)
    else:
        return _product(a, b, sum, PRECISION)


@triton.jit
def _rounded(dz, scale, vectors):
    """The gradient of products over the scale, in the vectors' dtype; in float16, where small numbers soon have few
    digits, with the scale."""
    if vectors.dtype == tl.float16:
        dz = dz * scale
    return dz.to(vectors.dtype)


@triton.jit
def _scaled(grad, scale, vectors):
    """What products of ``_rounded`` add up to, times the scale."""
    if vectors.dtype != tl.float16:
        grad = scale * grad
    return grad


@triton.jit
def _fma(x, y, z):
    """x y + z, rounded once."""
    if _INTERPRETED:  # which rounds twice
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def _exp2(x):
    if _INTERPRETED:
        return tl.exp2(x)
    else:  # results below 1e-38 become 0: tl.exp2 spends 3 more instructions to keep them
        return libdevice.exp2(x)


@triton.jit
def _base2(reference):
    """log2(e) reference, rounded whatever it is used for."""
    return _fma(reference, _LOG2E, 0.0)


@triton.jit
def _relative(u, reference2):
    """exp(u - reference) up to a factor near 1 that all u of the reference share: see _of_reference."""
    return _exp2(_fma(u, _LOG2E, -reference2))


@triton.jit
def _of_reference(reference):
    """What exponentials by _relative lack, because _base2 rounds."""
    return _exp2(-_fma(reference, _LOG2E, -_base2(reference)))


@triton.jit
def _relative_z(z, u_of_z, offset, reference2, CONSTANT: tl.constexpr):
    """exp(u - reference) of products z: u = u_of_z z + offset; both for exponents to the base 2 where CONSTANT."""
    if CONSTANT:
        return _exp2(_fma(z, u_of_z, offset))
    else:
        return _relative(_fma(z, u_of_z, offset), reference2)


@triton.jit
def _rescaled(before, after):
    """What turns sums of _relative to the maximum ``before`` into those to the larger ``after``."""
    return _exp2(tl.minimum(_base2(_reference(before)) - _base2(_reference(after)), 0.0))


@triton.jit
def _read(ptr, index, real, other):
    """ptr[index], ``other`` where not ``real``; None: all are."""
    if real is None:
        return tl.load(ptr + index)
    else:
        return tl.load(ptr + index, mask=real, other=other)


@triton.jit
def _of_keys(key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, columns, real, CONSTANT: tl.constexpr):
    """Labels of the keys, slope and offset of their logits (to the base 2, relative to the bound, where CONSTANT), and
    key_scale."""
    label = _read(key_label_ptr, columns, real, 0)
    key_scale = 1.0
    if CONSTANT:
        slope = scale * _LOG2E
        offset = -bound * _LOG2E
    else:
        slope = scale
        offset = scale * 0.0
        if key_scale_ptr is not None:
            key_scale = _read(key_scale_ptr, columns, real, 0.0)
            slope = scale * key_scale
        if key_bias_ptr is not None:
            offset = _read(key_bias_ptr, columns, real, -_INF)
    return label, slope, offset, key_scale


@triton.jit
def _left_out(exclude_ptr, row, inside):
    """The columns that rows leave out, -1 for none; the smallest and the largest of these."""
    exclude = tl.full(row.shape, -1, tl.int32)
    low, high = _NO_COLUMN, -1
    if exclude_ptr is not None:
        exclude = tl.load(exclude_ptr + row, mask=inside, other=-1)
        low, high = tl.min(tl.where(exclude < 0, _NO_COLUMN, exclude), 0), tl.max(exclude, 0)
    return exclude, low, high


@triton.jit
def _sums_added(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _positive_sums(same, x, y, AXIS: tl.constexpr):
    """Sums of x and of y over the positive columns along AXIS, and the number of these."""
    one = tl.where(same, 1.0, 0.0)
    x, y = one * x, one * y
    if _INTERPRETED:  # whose reductions are slow but for the usual ones
        return tl.sum(x, AXIS), tl.sum(y, AXIS), tl.sum(one, AXIS)
    else:  # together: alone the count, which no product is in, would be laid out apart from products
        return tl.reduce((x, y, one), AXIS, _sums_added)


@triton.jit
def _sides(label, key_label, column, columns, exclude, MASKED: tl.constexpr):
    """Which elements are positive, and which count for nothing."""
    same = label == key_label
    out = same
    if MASKED:
        out = (column >= columns) | (column == exclude)
        same = same & ~out
    return same, out


@triton.jit
def _joined(
    z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, neg_peak, neg_mass, pos_peak,
    pos_mass, pos_sum, num_pos, neg_slope, pos_slope, AXIS: tl.constexpr, MASKED: tl.constexpr,
    CONSTANT: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Both sides' statistics joined by those of a tile along AXIS. zero: which the compiler does not know to be 0, and
    so compares labels again rather than keep a tile of comparisons in registers. MASKED: some elements are left out."""
    same, out = _sides(label, key_label, column, columns, exclude, MASKED)
    u = _fma(z, slope, offset)
    if MASKED:
        u = tl.where(out, -_INF, u)
    if CONSTANT:
        e = _exp2(u)
    else:
        neg_before, pos_before = neg_peak, pos_peak
        neg_peak = tl.maximum(neg_peak, tl.max(tl.where(same, -_INF, u), AXIS))
        pos_peak = tl.maximum(pos_peak, tl.max(tl.where(same, u, -_INF), AXIS))
        neg_kept, pos_kept = _rescaled(neg_before, neg_peak), _rescaled(pos_before, pos_peak)
        neg_mass, pos_mass = neg_mass * neg_kept, pos_mass * pos_kept
        if SLOPES:
            neg_slope, pos_slope = neg_slope * neg_kept, pos_slope * pos_kept
        neg_reference = tl.expand_dims(_base2(_reference(neg_peak)), AXIS)
        pos_reference = tl.expand_dims(_base2(_reference(pos_peak)), AXIS)
        same, _ = _sides(label + zero, key_label, column, columns, exclude + zero, MASKED)
        e = _relative(u, tl.where(same, pos_reference, neg_reference))
    more_mass, more_sum, more = _positive_sums(same, e, z, AXIS)
    neg_mass, pos_mass = neg_mass + tl.sum(tl.where(same, 0.0, e), AXIS), pos_mass + more_mass
    pos_sum, num_pos = pos_sum + more_sum, num_pos + more
    if SLOPES:
        e = e * (key_scale * z)
        neg_slope += tl.sum(tl.where(same, 0.0, e), AXIS)
        pos_slope += tl.sum(tl.where(same, e, 0.0), AXIS)
    return neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope


@triton.jit
def _store_statistics(
    out_ptr, size, inside, neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope,
    CONSTANT: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """To rows of [6 or 8, size]; the peak of no mass is 0."""
    if not CONSTANT:
        neg_factor, pos_factor = _of_reference(_reference(neg_peak)), _of_reference(_reference(pos_peak))
        neg_mass, pos_mass, neg_slope, pos_slope = (
            neg_mass * neg_factor, pos_mass * pos_factor, neg_slope * neg_factor, pos_slope * pos_factor
        )  # fmt: skip
    tl.store(out_ptr + _NEG_PEAK * size, tl.where(neg_mass == 0.0, 0.0, neg_peak), mask=inside)
    tl.store(out_ptr + _NEG_MASS * size, neg_mass, mask=inside)
    tl.store(out_ptr + _POS_PEAK * size, tl.where(pos_mass == 0.0, 0.0, pos_peak), mask=inside)
    tl.store(out_ptr + _POS_MASS * size, pos_mass, mask=inside)
    tl.store(out_ptr + _POS_SUM * size, pos_sum, mask=inside)
    tl.store(out_ptr + _NUM_POS * size, num_pos, mask=inside)
    if SLOPES:
        tl.store(out_ptr + _NEG_SLOPE * size, neg_slope, mask=inside)
        tl.store(out_ptr + _POS_SLOPE * size, pos_slope, mask=inside)


@triton.jit
def _merged_side(
    from_ptr, size, mask, PEAK: tl.constexpr, MASS: tl.constexpr, SLOPE: tl.constexpr, SLOPES: tl.constexpr
):
    """One side's statistics from those of the splits, [SPLITS, BLOCK]."""
    mass = tl.load(from_ptr + MASS * size, mask=mask, other=0.0)
    peak = tl.where(mass == 0.0, -_INF, tl.load(from_ptr + PEAK * size, mask=mask, other=0.0))
    high = tl.max(peak, 0)
    kept = _exp2(tl.minimum(_reference(peak) - _reference(high)[None, :], 0.0) * _LOG2E)
    slope = tl.zeros_like(high)
    if SLOPES:
        slope = tl.sum(kept * tl.load(from_ptr + SLOPE * size, mask=mask, other=0.0), 0)
    return high, tl.sum(kept * mass, 0), slope


@triton.jit(do_not_specialize=["rows", "splits"])
def _merge_kernel(
    partial_ptr,  # [6 or 8, splits, N]
    out_ptr,  # [6 or 8, N]
    rows,
    splits,
    SLOPES: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, splits at least
    BLOCK: tl.constexpr,
):
    """The splits' statistics joined, all of a block of rows at once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)[:, None]
    inside = row < rows
    mask = (split < splits) & inside[None, :]
    size = splits * tl.cast(rows, tl.int64)
    from_ptr = partial_ptr + split * tl.cast(rows, tl.int64) + row[None, :]
    neg_peak, neg_mass, neg_slope = _merged_side(from_ptr, size, mask, _NEG_PEAK, _NEG_MASS, _NEG_SLOPE, SLOPES)
    pos_peak, pos_mass, pos_slope = _merged_side(from_ptr, size, mask, _POS_PEAK, _POS_MASS, _POS_SLOPE, SLOPES)
    pos_sum = tl.sum(tl.load(from_ptr + _POS_SUM * size, mask=mask, other=0.0), 0)
    num_pos = tl.sum(tl.load(from_ptr + _NUM_POS * size, mask=mask, other=0.0), 0)
    _store_statistics(
        out_ptr + row, tl.cast(rows, tl.int64), inside, neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos,
        neg_slope, pos_slope, True, SLOPES,
    )  # fmt: skip


# --- tiles, forward --------------------------------------------------------------------------------------------------


@triton.jit
def _special_tiles(first, end, columns, low, high, BLOCK_C: tl.constexpr):
    """Of the tiles from ``first`` to ``end``: where those that are full end, and between where columns are left out."""
    last = tl.minimum(end, columns // BLOCK_C)
    skip = tl.minimum(tl.maximum(low // BLOCK_C, first), last)
    return last, skip, tl.maximum(tl.minimum(high // BLOCK_C + 1, last), skip)


@triton.jit
def _tile_joined(
    begin, q, label, exclude, key_ptr, key_label_ptr, key_bias_ptr, key_scale_ptr, columns, width, key_stride, scale,
    bound, zero, neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope, MASKED: tl.constexpr,
    CONSTANT: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of the queries q joined by those of the keys from ``begin`` on."""
    column = begin + tl.arange(0, BLOCK_C)
    k = _vectors(key_ptr, column, columns, width, key_stride, FULL, BLOCK_D)
    column = column[None, :]
    real = None
    if MASKED:
        real = column < columns
    key_label, slope, offset, key_scale = _of_keys(
        key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, column, real, CONSTANT
    )
    z = _product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_C], tl.float32), PRECISION)
    return _joined(
        z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, neg_peak, neg_mass, pos_peak,
        pos_mass, pos_sum, num_pos, neg_slope, pos_slope, 1, MASKED, CONSTANT, SLOPES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "tiles_per_split"])
def _tiled_forward_kernel(
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
    """Statistics of the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    q = _vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
    label = tl.load(query_label_ptr + row, mask=inside, other=0)[:, None]
    exclude, low, high = _left_out(exclude_ptr, row, inside)
    exclude = exclude[:, None]
    scale = _full_scale(scale, learned_scale_ptr)
    zero = rows >> 31
    neg_peak, pos_peak = tl.full([BLOCK_N], -_INF, tl.float32), tl.full([BLOCK_N], -_INF, tl.float32)
    neg_mass, pos_mass = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    neg_slope, pos_slope = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    pos_sum, num_pos = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    split = tl.program_id(1)
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tl.cdiv(columns, BLOCK_C))
    MASKED: tl.constexpr = exclude_ptr is not None or RAGGED
    last, skip, skip_end = end, end, end
    if MASKED:
        last, skip, skip_end = _special_tiles(first, end, columns, low, high, BLOCK_C)
        if not APART:
            last, skip, skip_end = first, first, first
    if APART or not MASKED:
        for index in range(first, last - (skip_end - skip)):
            tile = tl.where(index < skip, index, index + (skip_end - skip))
            neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope = _tile_joined(
                tile * BLOCK_C, q, label, exclude, key_ptr, key_label_ptr, key_bias_ptr, key_scale_ptr, columns, width,
                key_stride, scale, bound, zero, neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope,
                pos_slope, False, CONSTANT, SLOPES, PRECISION, FULL, BLOCK_C, BLOCK_D,
            )  # fmt: skip
    if MASKED:  # a loop of its own: the registers of comparisons are not those of the loop above
        for index in tl.range(skip, skip_end + (end - last), num_stages=1 if APART else None):
            tile = tl.where(index < skip_end, index, last + (index - skip_end))
            neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope = _tile_joined(
                tile * BLOCK_C, q, label, exclude, key_ptr, key_label_ptr, key_bias_ptr, key_scale_ptr, columns, width,
                key_stride, scale, bound, zero, neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope,
                pos_slope, True, CONSTANT, SLOPES, PRECISION, FULL, BLOCK_C, BLOCK_D,
            )  # fmt: skip
    if CONSTANT:
        neg_peak, pos_peak = tl.zeros_like(neg_peak) + bound, tl.zeros_like(pos_peak) + bound
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    _store_statistics(
        out_ptr + split * tl.cast(rows, tl.int64) + row, size, inside, neg_peak, neg_mass, pos_peak, pos_mass, pos_sum,
        num_pos, neg_slope, pos_slope, CONSTANT, SLOPES,
    )  # fmt: skip


# --- tiles, backward -------------------------------------------------------------------------------------------------

#: Rows of the padded terms: references times log2(e), slopes, and the upstream gradient of the sum of positives.
_NEG_REFERENCE, _NEG_FACTOR, _POS_REFERENCE, _POS_FACTOR = _NEG_PEAK, _NEG_MASS, _POS_PEAK, _POS_MASS


@triton.jit(do_not_specialize=["rows", "padded"])
def _row_terms_kernel(
    terms_ptr,  # [5, N]
    exclude_ptr,  # [N] int32
    padded_terms_ptr,  # [5, padded N]; rows past the end give 0 to every gradient
    range_ptr,  # [2, ranges] int32: the smallest and the largest column that rows of a block leave out
    rows,
    padded,
    bound,
    CONSTANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the gradients of a block of rows are made of."""
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    size = tl.cast(rows, tl.int64)
    out_ptr = padded_terms_ptr + row
    out_size = tl.cast(padded, tl.int64)
    for side in tl.static_range(2):
        from_ptr = terms_ptr + 2 * side * size + row
        to_ptr = out_ptr + 2 * side * out_size
        peak = tl.load(from_ptr, mask=inside, other=0.0)
        factor = tl.load(from_ptr + size, mask=inside, other=0.0)
        if CONSTANT:  # the kernels' exponentials are relative to the bound
            factor = factor * _exp2((bound - peak) * _LOG2E)
        else:
            factor = factor * _of_reference(peak)
        tl.store(to_ptr, tl.where(inside, _base2(peak), _INF))
        tl.store(to_ptr + out_size, factor)
    tl.store(out_ptr + _POS_SUM * out_size, tl.load(terms_ptr + _POS_SUM * size + row, mask=inside, other=0.0))
    if exclude_ptr is not None:
        _, low, high = _left_out(exclude_ptr, row, inside)
        tl.store(range_ptr + block, low)
        tl.store(range_ptr + tl.num_programs(0) + block, high)


@triton.jit
def _row_terms(padded_terms_ptr, row, padded, CONSTANT: tl.constexpr):
    """References (0 where CONSTANT), factors and the upstream gradient of the sum."""
    size = tl.cast(padded, tl.int64)
    own_ptr = padded_terms_ptr + row
    neg_factor, pos_factor = tl.load(own_ptr + _NEG_FACTOR * size), tl.load(own_ptr + _POS_FACTOR * size)
    neg_reference, pos_reference = tl.zeros_like(neg_factor), tl.zeros_like(pos_factor)
    if not CONSTANT:
        neg_reference, pos_reference = (
            tl.load(own_ptr + _NEG_REFERENCE * size),
            tl.load(own_ptr + _POS_REFERENCE * size),
        )
    return neg_reference, neg_factor, pos_reference, pos_factor, tl.load(own_ptr + _POS_SUM * size)


@triton.jit(do_not_specialize=["rows", "padded", "columns", "tiles_per_split"])
def _grad_query_kernel(
    query_ptr,  # [N, D], unit stride along D
    key_ptr,  # [M, D], unit stride along D
    query_label_ptr,  # [N] int32
    key_label_ptr,  # [M] int32
    exclude_ptr,  # [N] int32
    key_bias_ptr,  # [M]
    key_scale_ptr,  # [M]
    learned_scale_ptr,  # 0-dim
    padded_terms_ptr,  # [5, padded N], see _row_terms_kernel
    grad_ptr,  # [splits, N, D]
    rows,
    padded,
    columns,
    width,
    tiles_per_split,
    query_stride,
    key_stride,
    scale,
    bound,
    CONSTANT: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of queries through the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    q = _vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
    label = tl.load(query_label_ptr + row, mask=inside, other=0)[:, None]
    exclude, low, high = _left_out(exclude_ptr, row, inside)
    neg_reference, neg_factor, pos_reference, pos_factor, pos_sum = _row_terms(padded_terms_ptr, row, padded, CONSTANT)
    scale = _full_scale(scale, learned_scale_ptr)
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(columns, BLOCK_C))):
        begin = tile * BLOCK_C
        column = begin + lane
        k = _vectors(key_ptr, column, columns, width, key_stride, FULL, BLOCK_D)
        columns_of = column[None, :]
        key_label, slope, offset, key_scale = _of_keys(
            key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, columns_of, columns_of < columns, CONSTANT
        )
        z = _product(q, tl.trans(k), tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        same = label == key_label
        reference = tl.where(same, pos_reference[:, None], neg_reference[:, None])
        dz = _relative_z(z, slope, offset, reference, CONSTANT) * tl.where(
            same, pos_factor[:, None], neg_factor[:, None]
        )
        if key_scale_ptr is not None:
            dz = dz * key_scale
        dz += tl.where(same, pos_sum[:, None], 0.0)
        if (begin + BLOCK_C > columns) | ((low < begin + BLOCK_C) & (high >= begin)):
            out = (column >= columns)[None, :]
            if exclude_ptr is not None:
                out = out | (column[None, :] == exclude[:, None])
            dz = tl.where(out, 0.0, dz)
        grad = _added_product(_rounded(dz, scale, k), k, grad, PRECISION)
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = (split * tl.cast(rows, tl.int64) + row)[:, None] * width + d
    tl.store(
        grad_ptr + offset, _scaled(grad, scale, q).to(grad_ptr.dtype.element_ty), mask=inside[:, None] & (d < width)
    )


@triton.jit(do_not_specialize=["rows", "padded", "ranges", "first_column", "end_column", "blocks", "blocks_per_split"])
def _grad_key_kernel(
    query_ptr,  # [N, D], unit stride along D
    key_ptr,  # [M, D], unit stride along D
    query_label_ptr,  # [N] int32
    key_label_ptr,  # [M] int32
    exclude_ptr,  # [N] int32
    key_bias_ptr,  # [M]
    key_scale_ptr,  # [M]
    learned_scale_ptr,  # 0-dim
    padded_terms_ptr,  # [5, padded N], see _row_terms_kernel
    range_ptr,  # [2, ranges] int32
    grad_ptr,  # [splits, end - first, D]; None where not needed
    sums_ptr,  # [splits, SUM_BIAS + SUM_SCALE, end - first]: sums over the rows of G and of G a z
    rows,
    padded,
    ranges,
    first_column,  # keys from here ...
    end_column,  # ... to here
    width,
    blocks,
    blocks_per_split,
    query_stride,
    key_stride,
    scale,
    bound,
    CONSTANT: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    SUM_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a block of keys through the queries of one split: tiles are [BLOCK_C, BLOCK_N]."""
    begin = first_column + tl.program_id(0) * BLOCK_C
    column = begin + tl.arange(0, BLOCK_C)
    real = column < end_column
    k = _vectors(key_ptr, column, end_column, width, key_stride, FULL, BLOCK_D)
    scale = _full_scale(scale, learned_scale_ptr)
    key_label, slope, offset, key_scale = _of_keys(
        key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, column[:, None], real[:, None], CONSTANT
    )
    grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    sum_scale = tl.zeros([BLOCK_C], tl.float32)
    split = tl.program_id(1)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        q = _vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
        label = tl.load(query_label_ptr + row, mask=row < rows, other=0)[None, :]
        neg_reference, neg_factor, pos_reference, pos_factor, pos_sum = _row_terms(
            padded_terms_ptr, row, padded, CONSTANT
        )
        partly = False
        if exclude_ptr is not None:
            partly = tl.load(range_ptr + block) < begin + BLOCK_C
            partly = partly & (tl.load(range_ptr + ranges + block) >= begin)
        z = _product(k, tl.trans(q), tl.zeros([BLOCK_C, BLOCK_N], tl.float32), PRECISION)
        same = key_label == label
        reference = tl.where(same, pos_reference[None, :], neg_reference[None, :])
        dz = _relative_z(z, slope, offset, reference, CONSTANT) * tl.where(
            same, pos_factor[None, :], neg_factor[None, :]
        )
        if SUM_BIAS or SUM_SCALE:
            if exclude_ptr is not None:
                if partly:
                    exclude = tl.load(exclude_ptr + row, mask=row < rows, other=-1)
                    dz = tl.where(column[:, None] == exclude[None, :], 0.0, dz)
            if SUM_BIAS:
                sum_bias += tl.sum(dz, 1)
            if SUM_SCALE:
                sum_scale += tl.sum(dz * z, 1)
        if grad_ptr is not None:
            if key_scale_ptr is not None:
                dz = dz * key_scale
            dz += tl.where(same, pos_sum[None, :], 0.0)
            if exclude_ptr is not None:
                if partly:
                    exclude = tl.load(exclude_ptr + row, mask=row < rows, other=-1)
                    dz = tl.where(column[:, None] == exclude[None, :], 0.0, dz)
            grad = _added_product(_rounded(dz, scale, q), q, grad, PRECISION)
    columns = tl.cast(end_column - first_column, tl.int64)
    own = split * columns + (column - first_column)
    if grad_ptr is not None:
        d = tl.arange(0, BLOCK_D)[None, :]
        grad = _scaled(grad, scale, k).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + own[:, None] * width + d, grad, mask=real[:, None] & (d < width))
    if sums_ptr is not None:
        to_ptr = sums_ptr + split * (SUM_BIAS + SUM_SCALE) * columns + (column - first_column)
        if SUM_BIAS:
            tl.store(to_ptr, sum_bias, mask=real)
        if SUM_SCALE:
            tl.store(to_ptr + SUM_BIAS * columns, scale * sum_scale, mask=real)


@triton.jit(do_not_specialize=["rows", "padded", "ranges", "tiles_per_split"])
def _grad_both_kernel(
    query_ptr,  # [N, D], unit stride along D
    query_label_ptr,  # [N] int32
    exclude_ptr,  # [N] int32
    learned_scale_ptr,  # 0-dim
    padded_terms_ptr,  # [5, padded N], see _row_terms_kernel
    range_ptr,  # [2, ranges] int32, of blocks of BLOCK_C rows
    grad_ptr,  # [splits, N, D]
    rows,
    padded,
    ranges,
    width,
    tiles_per_split,
    query_stride,
    scale,
    bound,
    CONSTANT: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of queries that are the keys too: through their own rows and through their columns."""
    own_begin = tl.program_id(0) * BLOCK_N
    row = own_begin + tl.arange(0, BLOCK_N)
    inside = row < rows
    x = _vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
    exclude, low, high = _left_out(exclude_ptr, row, inside)
    neg_reference, neg_factor, pos_reference, pos_factor, pos_sum = _row_terms(padded_terms_ptr, row, padded, CONSTANT)
    scale = _full_scale(scale, learned_scale_ptr)
    label, slope, offset, _ = _of_keys(
        query_label_ptr, None, None, scale, bound, row[:, None], inside[:, None], CONSTANT
    )
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(rows, BLOCK_C))):
        begin = tile * BLOCK_C
        column = begin + lane
        y = _vectors(query_ptr, column, rows, width, query_stride, FULL, BLOCK_D)
        other_label = tl.load(query_label_ptr + column, mask=column < rows, other=0)[None, :]
        other_neg_reference, other_neg_factor, other_pos_reference, other_pos_factor, other_pos_sum = _row_terms(
            padded_terms_ptr, column, padded, CONSTANT
        )
        partly = begin + BLOCK_C > rows
        if exclude_ptr is not None:
            partly = partly | ((low < begin + BLOCK_C) & (high >= begin))
            other_low, other_high = tl.load(range_ptr + tile), tl.load(range_ptr + ranges + tile)
            partly = partly | ((other_low < own_begin + BLOCK_N) & (other_high >= own_begin))
        z = _product(x, tl.trans(y), tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        same = label == other_label
        e = _relative_z(z, slope, offset, tl.where(same, pos_reference[:, None], neg_reference[:, None]), CONSTANT)
        other_e = e
        if not CONSTANT:
            other_reference = tl.where(same, other_pos_reference[None, :], other_neg_reference[None, :])
            other_e = _relative_z(z, slope, offset, other_reference, CONSTANT)
        dz = e * tl.where(same, pos_factor[:, None], neg_factor[:, None])
        dz += tl.where(same, pos_sum[:, None], 0.0)
        other_dz = other_e * tl.where(same, other_pos_factor[None, :], other_neg_factor[None, :])
        other_dz += tl.where(same, other_pos_sum[None, :], 0.0)
        if partly:
            out = (column >= rows)[None, :]
            other_out = out
            if exclude_ptr is not None:
                out = out | (column[None, :] == exclude[:, None])
                other_exclude = tl.load(exclude_ptr + column, mask=column < rows, other=-1)
                other_out = other_out | (row[:, None] == other_exclude[None, :])
            dz = tl.where(out, 0.0, dz)
            other_dz = tl.where(other_out, 0.0, other_dz)
        dz += other_dz
        grad = _added_product(_rounded(dz, scale, y), y, grad, PRECISION)
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = (split * tl.cast(rows, tl.int64) + row)[:, None] * width + d
    tl.store(
        grad_ptr + offset, _scaled(grad, scale, x).to(grad_ptr.dtype.element_ty), mask=inside[:, None] & (d < width)
    )


# --- blocks ----------------------------------------------------------------------------------------------------------


@triton.jit
def _columns_from(begin, columns, GROUP: tl.constexpr, LANES: tl.constexpr):
    """The columns from ``begin`` on; which are of whole groups; which are of the group that the last one does not fill;
    and whether there are such."""
    group = begin + (tl.arange(0, LANES) * GROUP)[:, None]
    column = group + tl.arange(0, GROUP)[None, :]
    cut = columns % GROUP
    edge = (column >= columns - cut) & (column < columns)
    return column, group <= columns - GROUP, edge, (cut > 0) & (begin + LANES * GROUP > columns - cut)


@triton.jit
def _wide(ptrs, whole, edge, has_edge, other):
    """What is at the pointers, the whole groups with the widest accesses; ``other`` where there is no column."""
    x = tl.load(ptrs, mask=whole, other=other)
    if has_edge:
        x = tl.where(edge, tl.load(ptrs, mask=edge, other=other), x)
    return x


@triton.jit
def _wide_of_keys(key_label_ptr, key_scale_ptr, key_bias_ptr, scale, column, whole, edge, has_edge):
    """The keys' labels, their logits' slope and offset, and key_scale."""
    label = _wide(key_label_ptr + column, whole, edge, has_edge, 0)
    slope, offset, key_scale = scale, scale * 0.0, 1.0
    if key_scale_ptr is not None:
        key_scale = _wide(key_scale_ptr + column, whole, edge, has_edge, 0.0)
        slope = scale * key_scale
    if key_bias_ptr is not None:
        offset = _wide(key_bias_ptr + column, whole, edge, has_edge, -_INF)
    return label, slope, offset, key_scale


@triton.jit
def _lanes_joined(peak, mass, slope):
    """One side's statistics of a row from those of its lanes."""
    high = tl.max(peak, 0)
    kept = _rescaled(peak, high)
    return high, tl.sum(mass * kept, 0), tl.sum(slope * kept, 0)


@triton.jit(do_not_specialize=["rows", "columns", "first_column", "tiles_per_split"])
def _block_forward_kernel(
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
    """Statistics of a row over the columns of one split; each lane has its own until the end."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(query_label_ptr + row)
    exclude = -1
    if exclude_ptr is not None:
        exclude = tl.load(exclude_ptr + row)
    exclude -= first_column
    scale = _full_scale(scale, learned_scale_ptr)
    zero = rows >> 31
    zeros = tl.zeros([LANES], tl.float32)
    neg_peak, pos_peak, neg_mass, pos_mass = zeros - _INF, zeros - _INF, zeros, zeros
    neg_slope, pos_slope, pos_sum, num_pos = zeros, zeros, zeros, zeros
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(columns, LANES * GROUP))):
        begin = tile * (LANES * GROUP)
        column, whole, edge, has_edge = _columns_from(begin, columns, GROUP, LANES)
        z = _wide(z_ptr + row * z_stride + column, whole, edge, has_edge, 0.0).to(tl.float32)
        key_label, slope, offset, key_scale = _wide_of_keys(
            key_label_ptr, key_scale_ptr, key_bias_ptr, scale, column, whole, edge, has_edge
        )
        if (begin + LANES * GROUP > columns) | ((exclude < begin + LANES * GROUP) & (exclude >= begin)):
            neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope = _joined(
                z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, neg_peak, neg_mass,
                pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope, 1, True, False, SLOPES,
            )  # fmt: skip
        else:
            neg_peak, neg_mass, pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope = _joined(
                z, label, key_label, slope, offset, key_scale, column, columns, exclude, zero, neg_peak, neg_mass,
                pos_peak, pos_mass, pos_sum, num_pos, neg_slope, pos_slope, 1, False, False, SLOPES,
            )  # fmt: skip
    neg_peak, neg_mass, neg_slope = _lanes_joined(neg_peak, neg_mass, neg_slope)
    pos_peak, pos_mass, pos_slope = _lanes_joined(pos_peak, pos_mass, pos_slope)
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    _store_statistics(
        out_ptr + split * tl.cast(rows, tl.int64) + row, size, None, neg_peak, neg_mass, pos_peak, pos_mass,
        tl.sum(pos_sum, 0), tl.sum(num_pos, 0), neg_slope, pos_slope, False, SLOPES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "first_column", "blocks_per_split"])
def _block_backward_kernel(
    z_ptr,  # [n, m], unit stride along m
    query_label_ptr,  # [n] int32
    key_label_ptr,  # [m] int32
    exclude_ptr,  # [n] int32
    key_bias_ptr,  # [m]
    key_scale_ptr,  # [m]
    learned_scale_ptr,  # 0-dim
    terms_ptr,  # [5, n], terms_stride apart
    dz_ptr,  # [n, m], unit stride along m; None where not needed
    sums_ptr,  # [splits, SUM_BIAS + SUM_SCALE, m]: sums over the rows of G and of G a z
    rows,
    columns,
    first_column,
    blocks_per_split,
    terms_stride,
    z_stride,
    dz_stride,
    scale,
    SUM_BIAS: tl.constexpr,
    SUM_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradients of the products of one block of columns with the rows of one split, ROWS at a time, and the columns'
    sums over these."""
    column, whole, edge, has_edge = _columns_from(tl.program_id(0) * (LANES * GROUP), columns, GROUP, LANES)
    scale = _full_scale(scale, learned_scale_ptr)
    key_label, slope, offset, _ = _wide_of_keys(
        key_label_ptr, key_scale_ptr, key_bias_ptr, scale, column, whole, edge, has_edge
    )
    sum_bias = tl.zeros([LANES, GROUP], tl.float32)
    sum_scale = tl.zeros([LANES, GROUP], tl.float32)
    terms_stride = tl.cast(terms_stride, tl.int64)
    split = tl.program_id(1)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, tl.cdiv(rows, ROWS))):
        zs = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(block * ROWS + r, rows - 1).to(tl.int64)
            zs = zs + (_wide(z_ptr + row * z_stride + column, whole, edge, has_edge, 0.0),)  # noqa: RUF005
        for r in tl.static_range(ROWS):
            inside = block * ROWS + r < rows
            row = tl.minimum(block * ROWS + r, rows - 1).to(tl.int64)
            own_ptr = terms_ptr + row
            neg_peak = tl.load(own_ptr + _NEG_PEAK * terms_stride)
            pos_peak = tl.load(own_ptr + _POS_PEAK * terms_stride)
            neg_factor = tl.load(own_ptr + _NEG_MASS * terms_stride, mask=inside, other=0.0)
            pos_factor = tl.load(own_ptr + _POS_MASS * terms_stride, mask=inside, other=0.0)
            z = zs[r].to(tl.float32)
            same = tl.load(query_label_ptr + row) == key_label
            e = _exp(_fma(z, slope, offset) - tl.where(same, pos_peak, neg_peak))
            gradient = e * tl.where(same, pos_factor, neg_factor)
            if exclude_ptr is not None:
                kept = first_column + column != tl.load(exclude_ptr + row)
                gradient = tl.where(kept, gradient, 0.0)
            if SUM_BIAS:
                sum_bias += gradient
            if SUM_SCALE:
                sum_scale += gradient * z
            if dz_ptr is not None:
                through_sum = tl.where(same, tl.load(own_ptr + _POS_SUM * terms_stride) * scale, 0.0)
                if exclude_ptr is not None:
                    through_sum = tl.where(kept, through_sum, 0.0)
                dz = (gradient * slope + through_sum).to(dz_ptr.dtype.element_ty)
                dz_ptrs = dz_ptr + row * dz_stride + column
                tl.store(dz_ptrs, dz, mask=whole & inside)
                if has_edge:
                    tl.store(dz_ptrs, dz, mask=edge & inside)
    if sums_ptr is not None:
        to_ptr = sums_ptr + split * (SUM_BIAS + SUM_SCALE) * tl.cast(columns, tl.int64) + column
        if SUM_BIAS:
            tl.store(to_ptr, sum_bias, mask=column < columns)
        if SUM_SCALE:
            tl.store(to_ptr + SUM_BIAS * tl.cast(columns, tl.int64), scale * sum_scale, mask=column < columns)
