"""Backward kernels of the partitioned log-sum-exp: tiles of products that are computed again, and blocks in memory.

A program of tiles does 4 D operations per element. Where the queries are the keys, one product per tile serves both:
dX_i = a sum_j (dS_ij + dS_ji) x_j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gemm import launch as gemm
from ..._gemm.launch import PADDING, Launch, column_sums, left_gradient, right_gradient
from ..._gemm.triton_tiles import (
    ColumnSums,
    inner_products,
    load_left,
    load_right,
    split_tiles,
    store_gradient,
    store_sums,
)
from ..._rows.triton_math import INF, fast_exp, load_scale
from ..._triton import launch_with
from ..arguments import N_TERMS, Arguments, Block
from .keys import (
    LOG2E,
    NEG_MASS,
    NEG_PEAK,
    POS_MASS,
    POS_PEAK,
    POS_SUM,
    Columns,
    add_product,
    block_columns,
    fast_exp2,
    load_columns,
    load_excluded,
    load_keys,
    reference_error,
    relative_exp_of_product,
    round_fma,
    round_gradient,
    scale_gradient,
    to_base2,
)
from .launch import BLOCK_ROWS, BLOCK_TOGETHER, block_arguments, block_launch, is_symmetric, tile_arguments

#: Rows of the padded terms: references times log2(e), slopes, and the upstream gradient of the sum of positives.
NEG_REFERENCE, NEG_FACTOR, POS_REFERENCE, POS_FACTOR = NEG_PEAK, NEG_MASS, POS_PEAK, POS_MASS


class RowTerms(NamedTuple):
    """The terms that rows' gradients are made of."""

    neg_reference: Any
    neg_factor: Any
    pos_reference: Any
    pos_factor: Any
    pos_sum: Any  # upstream gradient of the sum of positives


@triton.jit(do_not_specialize=["rows", "padded"])
def partitioned_logsumexp_row_terms_kernel(
    o,  # KeyOptions
    terms_ptr,  # [5, N]
    padded_terms_ptr,  # [5, padded N]; rows past the end give 0 to every gradient
    range_ptr,  # [2, ranges] int32: the smallest and the largest column that rows of a block leave out
    rows,
    padded,
    BLOCK: tl.constexpr,
):
    """Compute the terms that the gradients of a block of rows are made of."""
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
        if o.bounded:  # the kernels' exponentials are relative to the bound
            factor = factor * fast_exp2((o.bound - peak) * LOG2E)
        else:
            factor = factor * reference_error(peak)
        tl.store(to_ptr, tl.where(inside, to_base2(peak), INF))
        tl.store(to_ptr + out_size, factor)
    tl.store(out_ptr + POS_SUM * out_size, tl.load(terms_ptr + POS_SUM * size + row, mask=inside, other=0.0))
    if o.exclude_ptr is not None:
        _, low, high = load_excluded(o, row, inside)
        tl.store(range_ptr + block, low)
        tl.store(range_ptr + tl.num_programs(0) + block, high)


@triton.jit
def load_row_terms(padded_terms_ptr, row, padded, o):
    """Load the terms of rows; the references are 0 where there is a bound."""
    size = tl.cast(padded, tl.int64)
    own_ptr = padded_terms_ptr + row
    neg_factor, pos_factor = tl.load(own_ptr + NEG_FACTOR * size), tl.load(own_ptr + POS_FACTOR * size)
    neg_reference, pos_reference = tl.zeros_like(neg_factor), tl.zeros_like(pos_factor)
    if not o.bounded:
        neg_reference = tl.load(own_ptr + NEG_REFERENCE * size)
        pos_reference = tl.load(own_ptr + POS_REFERENCE * size)
    return RowTerms(neg_reference, neg_factor, pos_reference, pos_factor, tl.load(own_ptr + POS_SUM * size))


@triton.jit
def choose_side(same, positive, negative, AXIS: tl.constexpr):
    """Return each element's side of the rows' values, which lie along the other axis than AXIS."""
    return tl.where(same, tl.expand_dims(positive, AXIS), tl.expand_dims(negative, AXIS))


@triton.jit
def logit_gradient(z, same, keys, terms, o, AXIS: tl.constexpr):
    """Return G, the gradient of the logits of the products z."""
    reference = choose_side(same, terms.pos_reference, terms.neg_reference, AXIS)
    e = relative_exp_of_product(z, keys, reference, o)
    return e * choose_side(same, terms.pos_factor, terms.neg_factor, AXIS)


@triton.jit
def product_gradient(gradient, same, keys, terms, o, AXIS: tl.constexpr):
    """Return the gradient of products over the scale from the one of their logits."""
    if o.key_scale_ptr is not None:
        gradient = gradient * keys.scale
    return gradient + tl.where(same, tl.expand_dims(terms.pos_sum, AXIS), 0.0)


@triton.jit
def leave_out(dz, column, row, rows, partly, o):
    """Return dz [columns, rows] with 0 where a row leaves out the column. partly: whether any does."""
    if o.exclude_ptr is not None:
        if partly:
            exclude = tl.load(o.exclude_ptr + row, mask=row < rows, other=-1)
            dz = tl.where(column[:, None] == exclude[None, :], 0.0, dz)
    return dz


@triton.jit(do_not_specialize=["rows", "padded", "columns", "tiles_per_split"])
def partitioned_logsumexp_grad_query_kernel(
    f,  # Factors: queries and keys
    o,  # KeyOptions
    padded_terms_ptr,  # [5, padded N], see partitioned_logsumexp_row_terms_kernel
    grad_ptr,  # [splits, N, D]
    rows,
    padded,
    columns,
    tiles_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of a block of queries through the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    q = load_left(f, row, rows)
    label = tl.load(o.query_label_ptr + row, mask=inside, other=0)[:, None]
    exclude, low, high = load_excluded(o, row, inside)
    terms = load_row_terms(padded_terms_ptr, row, padded, o)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    grad = tl.zeros([BLOCK_N, f.block_d], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split, first, end = split_tiles(tiles_per_split, columns, BLOCK_C)
    for tile in range(first, end):
        begin = tile * BLOCK_C
        column = begin + lane
        k = load_right(f, column, columns)
        keys = load_keys(o, scale, Columns(column[None, :], column[None, :] < columns))
        z = inner_products(q, k, f)
        same = label == keys.label
        dz = product_gradient(logit_gradient(z, same, keys, terms, o, 1), same, keys, terms, o, 1)
        if (begin + BLOCK_C > columns) | ((low < begin + BLOCK_C) & (high >= begin)):
            out = (column >= columns)[None, :]
            if o.exclude_ptr is not None:
                out = out | (column[None, :] == exclude[:, None])
            dz = tl.where(out, 0.0, dz)
        grad = add_product(round_gradient(dz, scale, k), k, grad, f.precision)
    store_gradient(grad_ptr, scale_gradient(grad, scale, q), split, row, rows, f)


@triton.jit(do_not_specialize=["rows", "padded", "ranges", "first_column", "end_column", "blocks_per_split"])
def partitioned_logsumexp_grad_key_kernel(
    f,  # Factors: queries and keys
    o,  # KeyOptions
    padded_terms_ptr,  # [5, padded N], see partitioned_logsumexp_row_terms_kernel
    range_ptr,  # [2, ranges] int32
    grad_ptr,  # [splits, end - first, D]; None where not needed
    sums,  # ColumnSums of G and of G a z
    rows,
    padded,
    ranges,
    first_column,  # keys from here ...
    end_column,  # ... to here
    blocks_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradients of a block of keys through the queries of one split, in tiles [BLOCK_C, BLOCK_N]."""
    begin = first_column + tl.program_id(0) * BLOCK_C
    column = begin + tl.arange(0, BLOCK_C)
    real = column < end_column
    k = load_right(f, column, end_column)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    keys = load_keys(o, scale, Columns(column[:, None], real[:, None]))
    grad = tl.zeros([BLOCK_C, f.block_d], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    sum_scale = tl.zeros([BLOCK_C], tl.float32)
    split, first, end = split_tiles(blocks_per_split, rows, BLOCK_N)
    for block in range(first, end):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        q = load_left(f, row, rows)
        label = tl.load(o.query_label_ptr + row, mask=row < rows, other=0)[None, :]
        terms = load_row_terms(padded_terms_ptr, row, padded, o)
        partly = False
        if o.exclude_ptr is not None:
            partly = tl.load(range_ptr + block) < begin + BLOCK_C
            partly = partly & (tl.load(range_ptr + ranges + block) >= begin)
        z = inner_products(k, q, f)
        same = keys.label == label
        dz = logit_gradient(z, same, keys, terms, o, 0)
        if sums.first or sums.second:
            dz = leave_out(dz, column, row, rows, partly, o)
            if sums.first:
                sum_bias += tl.sum(dz, 1)
            if sums.second:
                sum_scale += tl.sum(dz * z, 1)
        if grad_ptr is not None:
            dz = leave_out(product_gradient(dz, same, keys, terms, o, 0), column, row, rows, partly, o)
            grad = add_product(round_gradient(dz, scale, q), q, grad, f.precision)
    own, columns = column - first_column, end_column - first_column
    if grad_ptr is not None:
        store_gradient(grad_ptr, scale_gradient(grad, scale, k), split, own, columns, f)
    store_sums(sums, sum_bias, scale * sum_scale, split, own, columns, real)


@triton.jit(do_not_specialize=["rows", "padded", "ranges", "tiles_per_split"])
def partitioned_logsumexp_grad_both_kernel(
    f,  # Factors; the queries are the keys too
    o,  # KeyOptions, likewise
    padded_terms_ptr,  # [5, padded N], see partitioned_logsumexp_row_terms_kernel
    range_ptr,  # [2, ranges] int32, of blocks of BLOCK_C rows
    grad_ptr,  # [splits, N, D]
    rows,
    padded,
    ranges,
    tiles_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of a block of queries that are the keys too, through their rows and their columns."""
    own_begin = tl.program_id(0) * BLOCK_N
    row = own_begin + tl.arange(0, BLOCK_N)
    inside = row < rows
    x = load_left(f, row, rows)
    exclude, low, high = load_excluded(o, row, inside)
    terms = load_row_terms(padded_terms_ptr, row, padded, o)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    keys = load_keys(o, scale, Columns(row[:, None], inside[:, None]))
    grad = tl.zeros([BLOCK_N, f.block_d], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split, first, end = split_tiles(tiles_per_split, rows, BLOCK_C)
    for tile in range(first, end):
        begin = tile * BLOCK_C
        column = begin + lane
        y = load_left(f, column, rows)
        other_label = tl.load(o.key_label_ptr + column, mask=column < rows, other=0)[None, :]
        other_terms = load_row_terms(padded_terms_ptr, column, padded, o)
        partly = begin + BLOCK_C > rows
        if o.exclude_ptr is not None:
            partly = partly | ((low < begin + BLOCK_C) & (high >= begin))
            other_low, other_high = tl.load(range_ptr + tile), tl.load(range_ptr + ranges + tile)
            partly = partly | ((other_low < own_begin + BLOCK_N) & (other_high >= own_begin))
        z = inner_products(x, y, f)
        same = keys.label == other_label
        dz = logit_gradient(z, same, keys, terms, o, 1)
        other_dz = logit_gradient(z, same, keys, other_terms, o, 0)
        dz = product_gradient(dz, same, keys, terms, o, 1)
        other_dz = product_gradient(other_dz, same, keys, other_terms, o, 0)
        if partly:
            out = (column >= rows)[None, :]
            other_out = out
            if o.exclude_ptr is not None:
                out = out | (column[None, :] == exclude[:, None])
                other_exclude = tl.load(o.exclude_ptr + column, mask=column < rows, other=-1)
                other_out = other_out | (row[:, None] == other_exclude[None, :])
            dz = tl.where(out, 0.0, dz)
            other_dz = tl.where(other_out, 0.0, other_dz)
        dz += other_dz
        grad = add_product(round_gradient(dz, scale, y), y, grad, f.precision)
    store_gradient(grad_ptr, scale_gradient(grad, scale, x), split, row, rows, f)


@triton.jit(do_not_specialize=["rows", "columns", "first_column", "blocks_per_split"])
def partitioned_logsumexp_block_backward_kernel(
    z_ptr,  # [n, m], unit stride along m
    o,  # KeyOptions
    terms_ptr,  # [5, n], terms_stride apart
    dz_ptr,  # [n, m], unit stride along m; None where not needed
    sums,  # ColumnSums of G and of G a z
    rows,
    columns,
    first_column,
    blocks_per_split,
    terms_stride,
    z_stride,
    dz_stride,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute the gradients of the products of one block of columns with the rows of one split, ROWS at a time, and the
    columns' sums over these rows."""
    tile = block_columns(tl.program_id(0) * (LANES * GROUP), columns, GROUP, LANES)
    column = tile.index
    scale = load_scale(o.scale, o.learned_scale_ptr)
    keys = load_keys(o, scale, tile)
    sum_bias = tl.zeros([LANES, GROUP], tl.float32)
    sum_scale = tl.zeros([LANES, GROUP], tl.float32)
    terms_stride = tl.cast(terms_stride, tl.int64)
    split, first, end = split_tiles(blocks_per_split, rows, ROWS)
    for block in range(first, end):
        zs = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(block * ROWS + r, rows - 1).to(tl.int64)
            zs = zs + (load_columns(z_ptr + row * z_stride, tile, 0.0),)  # noqa: RUF005
        for r in tl.static_range(ROWS):
            inside = block * ROWS + r < rows
            row = tl.minimum(block * ROWS + r, rows - 1).to(tl.int64)
            own_ptr = terms_ptr + row
            neg_peak = tl.load(own_ptr + NEG_PEAK * terms_stride)
            pos_peak = tl.load(own_ptr + POS_PEAK * terms_stride)
            neg_factor = tl.load(own_ptr + NEG_MASS * terms_stride, mask=inside, other=0.0)
            pos_factor = tl.load(own_ptr + POS_MASS * terms_stride, mask=inside, other=0.0)
            z = zs[r].to(tl.float32)
            same = tl.load(o.query_label_ptr + row) == keys.label
            e = fast_exp(round_fma(z, keys.slope, keys.offset) - tl.where(same, pos_peak, neg_peak))
            gradient = e * tl.where(same, pos_factor, neg_factor)
            if o.exclude_ptr is not None:
                kept = first_column + column != tl.load(o.exclude_ptr + row)
                gradient = tl.where(kept, gradient, 0.0)
            if sums.first:
                sum_bias += gradient
            if sums.second:
                sum_scale += gradient * z
            if dz_ptr is not None:
                through_sum = tl.where(same, tl.load(own_ptr + POS_SUM * terms_stride) * scale, 0.0)
                if o.exclude_ptr is not None:
                    through_sum = tl.where(kept, through_sum, 0.0)
                dz = (gradient * keys.slope + through_sum).to(dz_ptr.dtype.element_ty)
                dz_ptrs = dz_ptr + row * dz_stride + column
                tl.store(dz_ptrs, dz, mask=tile.whole & inside)
                if tile.has_edge:
                    tl.store(dz_ptrs, dz, mask=tile.edge & inside)
    store_sums(sums, sum_bias, scale * sum_scale, split, column, columns, column < columns)


# --- launchers -------------------------------------------------------------------------------------------------------


def backward(block: Block, terms: Tensor, needs: list[bool], out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write the gradient of a block's products to ``out``; return the sums over rows [m], [0] where not needed."""
    n, m = block.z.shape
    if n == 0 or m == 0:
        bias, scale = (block.z.new_zeros((m if need else 0,), dtype=torch.float32) for need in needs[1:])
        return bias, scale
    if not any(needs):
        none = terms.new_empty((0,))
        return none, none
    with torch.cuda.device_of(block.z):
        constants = block_launch(m)
        programs = triton.cdiv(m, constants["LANES"] * constants["GROUP"])
        cut = gemm.cut(programs, triton.cdiv(n, BLOCK_ROWS), BLOCK_TOGETHER, 256)
        sums = column_sums(cut.splits, needs[1], needs[2], m, terms)
        if terms.stride(1) != 1:
            terms = terms.contiguous()
        arguments = block_arguments(block) | {
            "terms_ptr": terms,
            "dz_ptr": out if needs[0] else None,
            "sums": sums,
            "blocks_per_split": cut.per_split,
            "terms_stride": terms.stride(0),
            "dz_stride": 0 if out is None else out.stride(0),
        }
        launch_with(partitioned_logsumexp_block_backward_kernel, cut.grid, arguments, ROWS=BLOCK_ROWS, **constants)
        return add_sums_of_splits(sums, terms)


def add_sums_of_splits(sums: ColumnSums, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of both values [m], [0] if not wanted, the splits added up in a fixed order."""
    none = like.new_empty((0,))
    if sums.ptr is None:
        return none, none
    first, second = sums.first.value, sums.second.value
    total = sums.ptr[0] if len(sums.ptr) == 1 else sums.ptr.sum(0)
    if first and second:  # apart: compiled code takes results to start at multiples of 16 bytes
        return total[0].clone(), total[1].clone()
    return total[0] if first else none, total[0] if second else none


def tiled_backward(a: Arguments, terms: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of query and key, and the sums over rows of G and of G a z [M]; [0] where not needed.

    If the queries are the keys, the query's gradient is the whole one. terms: as of ``Block``.
    """
    n, m = a.query.shape[0], a.keys.shape[0]
    need_query, need_key, *of_columns = needs
    need_key = need_key and a.key is not None
    none = a.query.new_empty((0,))
    if n == 0 or m == 0:
        column = a.query.new_zeros((m,), dtype=torch.float32)
        likes = zip((a.query, a.keys, column, column), (need_query, need_key, *of_columns), strict=True)
        return [torch.zeros_like(like) if need else none for like, need in likes]
    if not (need_query or need_key or any(of_columns)):
        return [none] * 4
    with torch.cuda.device_of(a.query):
        arguments, launches = tile_arguments(a)
        if is_symmetric(a) and need_query and not any(of_columns):
            launch = (arguments["o"].bounded.value and launches.grad_both_bounded) or launches.grad_both
            arguments |= pad_terms(arguments, terms, launch.block_c)
            kernel = partitioned_logsumexp_grad_both_kernel
            return [left_gradient(kernel, arguments, launch, a.query, m, a.query.dtype), none, none, none]
        arguments |= pad_terms(arguments, terms, launches.grad_key.block_n)
        dtype = a.query.dtype if a.key is not None else torch.float32
        grad_query = grad_key = none
        if need_query:
            kernel = partitioned_logsumexp_grad_query_kernel
            grad_query = left_gradient(kernel, arguments, launches.grad_query, a.query, m, dtype)
        through_columns = need_key or (need_query and a.key is None)
        of_keys, sums = _backward_keys(a, arguments, launches.grad_key, dtype, through_columns, of_columns)
        if a.key is None and need_query:
            grad_query[a.key_grad_begin : a.key_grad_end] += of_keys
            grad_query = grad_query.to(a.query.dtype)
        elif need_key:
            grad_key = of_keys
            if len(of_keys) < m:
                grad_key = a.keys.new_zeros(a.keys.shape)
                grad_key[a.key_grad_begin : a.key_grad_end] = of_keys
        return [grad_query, grad_key, *sums]


def pad_terms(arguments: dict[str, Any], terms: Tensor, block: int) -> dict[str, Any]:
    """Return the padded terms, and which columns each block of so many rows leaves out."""
    padded = triton.cdiv(arguments["rows"], PADDING) * PADDING
    blocks = padded // block
    excludes = arguments["o"].exclude_ptr is not None
    own = {
        "terms_ptr": terms.contiguous(),
        "padded_terms_ptr": terms.new_empty((N_TERMS, padded)),
        "range_ptr": terms.new_empty((2, blocks), dtype=torch.int32) if excludes else None,
        "padded": padded,
        "ranges": blocks,
    }
    constants = {"BLOCK": block, "num_warps": max(1, min(4, block // 32))}
    launch_with(partitioned_logsumexp_row_terms_kernel, (blocks,), arguments | own, **constants)
    return own


def _backward_keys(
    a: Arguments, arguments: dict[str, Any], launch: Launch, dtype: torch.dtype, need_key: bool, of_columns: list[bool]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the gradient of the keys that receive one, and all keys' sums over rows [M]; [0] where not needed."""
    begin, end = (a.key_grad_begin, a.key_grad_end) if need_key else (0, 0)
    none = arguments["terms_ptr"].new_empty((0,))
    grad = a.keys.new_zeros((0, a.keys.shape[1]), dtype=dtype) if need_key else none
    sums = []
    for first, last in ((0, begin), (begin, end), (end, a.keys.shape[0])):
        learns = (first, last) == (begin, end)
        if first < last and (learns or any(of_columns)):
            part, total = right_gradient(
                partitioned_logsumexp_grad_key_kernel, arguments | {"first_column": first, "end_column": last}, launch,
                a.keys[first:last], a.query.shape[0], dtype if learns else None, *of_columns,
            )  # fmt: skip
            grad = part if learns else grad
            sums.append(add_sums_of_splits(total, none))
    if not sums:
        return grad, (none, none)
    of_bias, of_scale = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*sums, strict=True))
    return grad, (of_bias, of_scale)
