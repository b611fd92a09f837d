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
from ..._gemm.launch import PADDING, Launch, add_splits, most_splits, partial_gradients
from ..._gemm.triton_tiles import load_vectors, tile_product
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
    add_product,
    block_columns,
    fast_exp2,
    load_excluded,
    load_keys,
    load_wide,
    load_wide_keys,
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
        if CONSTANT:  # the kernels' exponentials are relative to the bound
            factor = factor * fast_exp2((bound - peak) * LOG2E)
        else:
            factor = factor * reference_error(peak)
        tl.store(to_ptr, tl.where(inside, to_base2(peak), INF))
        tl.store(to_ptr + out_size, factor)
    tl.store(out_ptr + POS_SUM * out_size, tl.load(terms_ptr + POS_SUM * size + row, mask=inside, other=0.0))
    if exclude_ptr is not None:
        _, low, high = load_excluded(exclude_ptr, row, inside)
        tl.store(range_ptr + block, low)
        tl.store(range_ptr + tl.num_programs(0) + block, high)


@triton.jit
def load_row_terms(padded_terms_ptr, row, padded, CONSTANT: tl.constexpr):
    """Load the terms of rows; the references are 0 where CONSTANT."""
    size = tl.cast(padded, tl.int64)
    own_ptr = padded_terms_ptr + row
    neg_factor, pos_factor = tl.load(own_ptr + NEG_FACTOR * size), tl.load(own_ptr + POS_FACTOR * size)
    neg_reference, pos_reference = tl.zeros_like(neg_factor), tl.zeros_like(pos_factor)
    if not CONSTANT:
        neg_reference, pos_reference = (
            tl.load(own_ptr + NEG_REFERENCE * size),
            tl.load(own_ptr + POS_REFERENCE * size),
        )
    return RowTerms(neg_reference, neg_factor, pos_reference, pos_factor, tl.load(own_ptr + POS_SUM * size))


@triton.jit(do_not_specialize=["rows", "padded", "columns", "tiles_per_split"])
def partitioned_logsumexp_grad_query_kernel(
    query_ptr,  # [N, D], unit stride along D
    key_ptr,  # [M, D], unit stride along D
    query_label_ptr,  # [N] int32
    key_label_ptr,  # [M] int32
    exclude_ptr,  # [N] int32
    key_bias_ptr,  # [M]
    key_scale_ptr,  # [M]
    learned_scale_ptr,  # 0-dim
    padded_terms_ptr,  # [5, padded N], see partitioned_logsumexp_row_terms_kernel
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
    """Compute the gradient of a block of queries through the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    q = load_vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
    label = tl.load(query_label_ptr + row, mask=inside, other=0)[:, None]
    exclude, low, high = load_excluded(exclude_ptr, row, inside)
    terms = load_row_terms(padded_terms_ptr, row, padded, CONSTANT)
    scale = load_scale(scale, learned_scale_ptr)
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(columns, BLOCK_C))):
        begin = tile * BLOCK_C
        column = begin + lane
        k = load_vectors(key_ptr, column, columns, width, key_stride, FULL, BLOCK_D)
        columns_of = column[None, :]
        key_label, slope, offset, key_scale = load_keys(
            key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, columns_of, columns_of < columns, CONSTANT
        )
        z = tile_product(q, tl.trans(k), tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        same = label == key_label
        reference = tl.where(same, terms.pos_reference[:, None], terms.neg_reference[:, None])
        dz = relative_exp_of_product(z, slope, offset, reference, CONSTANT) * tl.where(
            same, terms.pos_factor[:, None], terms.neg_factor[:, None]
        )
        if key_scale_ptr is not None:
            dz = dz * key_scale
        dz += tl.where(same, terms.pos_sum[:, None], 0.0)
        if (begin + BLOCK_C > columns) | ((low < begin + BLOCK_C) & (high >= begin)):
            out = (column >= columns)[None, :]
            if exclude_ptr is not None:
                out = out | (column[None, :] == exclude[:, None])
            dz = tl.where(out, 0.0, dz)
        grad = add_product(round_gradient(dz, scale, k), k, grad, PRECISION)
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = (split * tl.cast(rows, tl.int64) + row)[:, None] * width + d
    tl.store(
        grad_ptr + offset,
        scale_gradient(grad, scale, q).to(grad_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < width),
    )


@triton.jit(do_not_specialize=["rows", "padded", "ranges", "first_column", "end_column", "blocks", "blocks_per_split"])
def partitioned_logsumexp_grad_key_kernel(
    query_ptr,  # [N, D], unit stride along D
    key_ptr,  # [M, D], unit stride along D
    query_label_ptr,  # [N] int32
    key_label_ptr,  # [M] int32
    exclude_ptr,  # [N] int32
    key_bias_ptr,  # [M]
    key_scale_ptr,  # [M]
    learned_scale_ptr,  # 0-dim
    padded_terms_ptr,  # [5, padded N], see partitioned_logsumexp_row_terms_kernel
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
    """Compute the gradients of a block of keys through the queries of one split, in tiles [BLOCK_C, BLOCK_N]."""
    begin = first_column + tl.program_id(0) * BLOCK_C
    column = begin + tl.arange(0, BLOCK_C)
    real = column < end_column
    k = load_vectors(key_ptr, column, end_column, width, key_stride, FULL, BLOCK_D)
    scale = load_scale(scale, learned_scale_ptr)
    key_label, slope, offset, key_scale = load_keys(
        key_label_ptr, key_scale_ptr, key_bias_ptr, scale, bound, column[:, None], real[:, None], CONSTANT
    )
    grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    sum_scale = tl.zeros([BLOCK_C], tl.float32)
    split = tl.program_id(1)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        q = load_vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
        label = tl.load(query_label_ptr + row, mask=row < rows, other=0)[None, :]
        terms = load_row_terms(padded_terms_ptr, row, padded, CONSTANT)
        partly = False
        if exclude_ptr is not None:
            partly = tl.load(range_ptr + block) < begin + BLOCK_C
            partly = partly & (tl.load(range_ptr + ranges + block) >= begin)
        z = tile_product(k, tl.trans(q), tl.zeros([BLOCK_C, BLOCK_N], tl.float32), PRECISION)
        same = key_label == label
        reference = tl.where(same, terms.pos_reference[None, :], terms.neg_reference[None, :])
        dz = relative_exp_of_product(z, slope, offset, reference, CONSTANT) * tl.where(
            same, terms.pos_factor[None, :], terms.neg_factor[None, :]
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
            dz += tl.where(same, terms.pos_sum[None, :], 0.0)
            if exclude_ptr is not None:
                if partly:
                    exclude = tl.load(exclude_ptr + row, mask=row < rows, other=-1)
                    dz = tl.where(column[:, None] == exclude[None, :], 0.0, dz)
            grad = add_product(round_gradient(dz, scale, q), q, grad, PRECISION)
    columns = tl.cast(end_column - first_column, tl.int64)
    own = split * columns + (column - first_column)
    if grad_ptr is not None:
        d = tl.arange(0, BLOCK_D)[None, :]
        grad = scale_gradient(grad, scale, k).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + own[:, None] * width + d, grad, mask=real[:, None] & (d < width))
    if sums_ptr is not None:
        to_ptr = sums_ptr + split * (SUM_BIAS + SUM_SCALE) * columns + (column - first_column)
        if SUM_BIAS:
            tl.store(to_ptr, sum_bias, mask=real)
        if SUM_SCALE:
            tl.store(to_ptr + SUM_BIAS * columns, scale * sum_scale, mask=real)


@triton.jit(do_not_specialize=["rows", "padded", "ranges", "tiles_per_split"])
def partitioned_logsumexp_grad_both_kernel(
    query_ptr,  # [N, D], unit stride along D
    query_label_ptr,  # [N] int32
    exclude_ptr,  # [N] int32
    learned_scale_ptr,  # 0-dim
    padded_terms_ptr,  # [5, padded N], see partitioned_logsumexp_row_terms_kernel
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
    """Compute the gradient of a block of queries that are the keys too, through their rows and their columns."""
    own_begin = tl.program_id(0) * BLOCK_N
    row = own_begin + tl.arange(0, BLOCK_N)
    inside = row < rows
    x = load_vectors(query_ptr, row, rows, width, query_stride, FULL, BLOCK_D)
    exclude, low, high = load_excluded(exclude_ptr, row, inside)
    terms = load_row_terms(padded_terms_ptr, row, padded, CONSTANT)
    scale = load_scale(scale, learned_scale_ptr)
    label, slope, offset, _ = load_keys(
        query_label_ptr, None, None, scale, bound, row[:, None], inside[:, None], CONSTANT
    )
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(rows, BLOCK_C))):
        begin = tile * BLOCK_C
        column = begin + lane
        y = load_vectors(query_ptr, column, rows, width, query_stride, FULL, BLOCK_D)
        other_label = tl.load(query_label_ptr + column, mask=column < rows, other=0)[None, :]
        other = load_row_terms(padded_terms_ptr, column, padded, CONSTANT)
        partly = begin + BLOCK_C > rows
        if exclude_ptr is not None:
            partly = partly | ((low < begin + BLOCK_C) & (high >= begin))
            other_low, other_high = tl.load(range_ptr + tile), tl.load(range_ptr + ranges + tile)
            partly = partly | ((other_low < own_begin + BLOCK_N) & (other_high >= own_begin))
        z = tile_product(x, tl.trans(y), tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        same = label == other_label
        e = relative_exp_of_product(
            z, slope, offset, tl.where(same, terms.pos_reference[:, None], terms.neg_reference[:, None]), CONSTANT
        )
        other_e = e
        if not CONSTANT:
            other_reference = tl.where(same, other.pos_reference[None, :], other.neg_reference[None, :])
            other_e = relative_exp_of_product(z, slope, offset, other_reference, CONSTANT)
        dz = e * tl.where(same, terms.pos_factor[:, None], terms.neg_factor[:, None])
        dz += tl.where(same, terms.pos_sum[:, None], 0.0)
        other_dz = other_e * tl.where(same, other.pos_factor[None, :], other.neg_factor[None, :])
        other_dz += tl.where(same, other.pos_sum[None, :], 0.0)
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
        grad = add_product(round_gradient(dz, scale, y), y, grad, PRECISION)
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = (split * tl.cast(rows, tl.int64) + row)[:, None] * width + d
    tl.store(
        grad_ptr + offset,
        scale_gradient(grad, scale, x).to(grad_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < width),
    )


@triton.jit(do_not_specialize=["rows", "columns", "first_column", "blocks_per_split"])
def partitioned_logsumexp_block_backward_kernel(
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
    """Compute the gradients of the products of one block of columns with the rows of one split, ROWS at a time, and the
    columns' sums over these rows."""
    column, whole, edge, has_edge = block_columns(tl.program_id(0) * (LANES * GROUP), columns, GROUP, LANES)
    scale = load_scale(scale, learned_scale_ptr)
    key_label, slope, offset, _ = load_wide_keys(
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
            zs = zs + (load_wide(z_ptr + row * z_stride + column, whole, edge, has_edge, 0.0),)  # noqa: RUF005
        for r in tl.static_range(ROWS):
            inside = block * ROWS + r < rows
            row = tl.minimum(block * ROWS + r, rows - 1).to(tl.int64)
            own_ptr = terms_ptr + row
            neg_peak = tl.load(own_ptr + NEG_PEAK * terms_stride)
            pos_peak = tl.load(own_ptr + POS_PEAK * terms_stride)
            neg_factor = tl.load(own_ptr + NEG_MASS * terms_stride, mask=inside, other=0.0)
            pos_factor = tl.load(own_ptr + POS_MASS * terms_stride, mask=inside, other=0.0)
            z = zs[r].to(tl.float32)
            same = tl.load(query_label_ptr + row) == key_label
            e = fast_exp(round_fma(z, slope, offset) - tl.where(same, pos_peak, neg_peak))
            gradient = e * tl.where(same, pos_factor, neg_factor)
            if exclude_ptr is not None:
                kept = first_column + column != tl.load(exclude_ptr + row)
                gradient = tl.where(kept, gradient, 0.0)
            if SUM_BIAS:
                sum_bias += gradient
            if SUM_SCALE:
                sum_scale += gradient * z
            if dz_ptr is not None:
                through_sum = tl.where(same, tl.load(own_ptr + POS_SUM * terms_stride) * scale, 0.0)
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


# --- launchers -------------------------------------------------------------------------------------------------------


def backward(block: Block, terms: Tensor, needs: list[bool], out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write the gradient of a block's products to ``out``; return the sums over rows [m], [0] where not needed."""
    n, m = block.z.shape
    need_products, need_bias, need_scale = needs
    if n == 0 or m == 0:
        bias, scale = (block.z.new_zeros((m if need else 0,), dtype=torch.float32) for need in needs[1:])
        return bias, scale
    none = terms.new_empty((0,))
    if not any(needs):
        return none, none
    with torch.cuda.device_of(block.z):
        constants = block_launch(m)
        programs = triton.cdiv(m, constants["LANES"] * constants["GROUP"])
        blocks = triton.cdiv(n, BLOCK_ROWS)
        per_split = gemm.tiles_per_split(programs, blocks, BLOCK_TOGETHER, 256)
        splits = triton.cdiv(blocks, per_split)
        kinds = need_bias + need_scale
        sums = terms.new_empty((splits, kinds, m), dtype=torch.float32) if kinds else None
        if terms.stride(1) != 1:
            terms = terms.contiguous()
        arguments = block_arguments(block) | {
            "terms_ptr": terms,
            "dz_ptr": out if need_products else None,
            "sums_ptr": sums,
            "blocks_per_split": per_split,
            "terms_stride": terms.stride(0),
            "dz_stride": 0 if out is None else out.stride(0),
            "SUM_BIAS": need_bias,
            "SUM_SCALE": need_scale,
        }
        launch_with(
            partitioned_logsumexp_block_backward_kernel, (programs, splits), arguments, ROWS=BLOCK_ROWS, **constants
        )
        return add_sums_of_splits(sums, need_bias, need_scale, none)


def add_sums_of_splits(sums: Tensor | None, need_bias: bool, need_scale: bool, none: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of each kind [m] of [splits, kinds, m], the splits added up in a fixed order."""
    if sums is None:
        return none, none
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    if need_bias and need_scale:  # apart: compiled code takes results to start at multiples of 16 bytes
        return total[0].clone(), total[1].clone()
    return total[0] if need_bias else none, total[0] if need_scale else none


def tiled_backward(a: Arguments, terms: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of query and key, and the sums over rows of G and of G a z [M]; [0] where not needed.

    If the queries are the keys, the query's gradient is the whole one. terms: as of ``Block``.
    """
    n, m = a.query.shape[0], a.keys.shape[0]
    need_query, need_key, need_bias, need_scale = needs
    need_key = need_key and a.key is not None
    none = a.query.new_empty((0,))
    if n == 0 or m == 0:
        column = a.query.new_zeros((m,), dtype=torch.float32)
        likes = zip((a.query, a.keys, column, column), (need_query, need_key, need_bias, need_scale), strict=True)
        return [torch.zeros_like(like) if need else none for like, need in likes]
    if not (need_query or need_key or need_bias or need_scale):
        return [none] * 4
    with torch.cuda.device_of(a.query):
        arguments, launches = tile_arguments(a)
        if is_symmetric(a) and need_query and not (need_bias or need_scale):
            launch = (arguments["CONSTANT"] and launches.grad_both_bounded) or launches.grad_both
            arguments |= pad_terms(arguments, terms, launch.block_c)
            return [add_splits(_backward_both(a, arguments, launch), a.query.dtype), none, none, none]
        arguments |= pad_terms(arguments, terms, launches.grad_key.block_n)
        grad_query = grad_key = none
        if need_query:
            dtype = a.query.dtype if a.key is not None else torch.float32
            grad_query = add_splits(_backward_query(a, arguments, launches.grad_query, dtype), dtype)
        through_columns = need_key or (need_query and a.key is None)
        of_keys, sums = _backward_keys(a, arguments, launches.grad_key, through_columns, need_bias, need_scale)
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
    rows = arguments["rows"]
    padded = triton.cdiv(rows, PADDING) * PADDING
    blocks = padded // block
    own = {
        "terms_ptr": terms.contiguous(),
        "padded_terms_ptr": terms.new_empty((N_TERMS, padded)),
        "range_ptr": None if arguments["exclude_ptr"] is None else terms.new_empty((2, blocks), dtype=torch.int32),
        "padded": padded,
        "ranges": blocks,
    }
    launch_with(
        partitioned_logsumexp_row_terms_kernel,
        (blocks,),
        arguments | own,
        BLOCK=block,
        num_warps=max(1, min(4, block // 32)),
    )
    return own


def _backward_query(a: Arguments, arguments: dict[str, Any], launch: Launch, dtype: torch.dtype) -> Tensor:
    """Return the partial gradients [splits, N, D]."""
    blocks, tiles = triton.cdiv(arguments["rows"], launch.block_n), triton.cdiv(arguments["columns"], launch.block_c)
    per_split = gemm.tiles_per_split(blocks, tiles, launch.together, most_splits(a.query.numel()))
    grad = partial_gradients(triton.cdiv(tiles, per_split), a.query, dtype)
    own = {"grad_ptr": grad, "tiles_per_split": per_split}
    launch_with(partitioned_logsumexp_grad_query_kernel, (blocks, len(grad)), arguments | own, **launch.constants)
    return grad


def _backward_both(a: Arguments, arguments: dict[str, Any], launch: Launch) -> Tensor:
    """Return the partial gradients [splits, N, D]."""
    blocks, tiles = triton.cdiv(arguments["rows"], launch.block_n), triton.cdiv(arguments["rows"], launch.block_c)
    per_split = gemm.tiles_per_split(blocks, tiles, launch.together, most_splits(a.query.numel()))
    grad = partial_gradients(triton.cdiv(tiles, per_split), a.query, a.query.dtype)
    own = {"grad_ptr": grad, "tiles_per_split": per_split}
    launch_with(partitioned_logsumexp_grad_both_kernel, (blocks, len(grad)), arguments | own, **launch.constants)
    return grad


def _backward_keys(
    a: Arguments, arguments: dict[str, Any], launch: Launch, need_key: bool, need_bias: bool, need_scale: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the gradient of the keys that receive one, and all keys' sums over rows [M]; [0] where not needed."""
    begin, end = (a.key_grad_begin, a.key_grad_end) if need_key else (0, 0)
    grad, none = arguments["padded_terms_ptr"].new_empty((0,)), arguments["padded_terms_ptr"].new_empty((0,))
    dtype = a.query.dtype if a.key is not None else torch.float32
    sums: list[tuple[Tensor, Tensor]] = []
    if begin < end:
        partial, total = _backward_key_range(a, arguments, launch, begin, end, dtype, need_bias, need_scale)
        grad, sums = add_splits(partial, dtype), [total]
    elif need_key:
        grad = a.keys.new_zeros((0, a.keys.shape[1]), dtype=dtype)
    if need_bias or need_scale:
        m = arguments["columns"]
        before, after = (
            [_backward_key_range(a, arguments, launch, first, last, None, need_bias, need_scale)[1]]
            if first < last
            else []
            for first, last in ((0, begin), (end, m))
        )
        sums = before + sums + after
    if not sums:
        return grad, (none, none)
    of_bias, of_scale = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*sums, strict=True))
    return grad, (of_bias, of_scale)


def _backward_key_range(
    a: Arguments, arguments: dict[str, Any], launch: Launch, begin: int, end: int, dtype: torch.dtype | None,
    need_bias: bool, need_scale: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return the partial gradients of a range of keys [splits, end - begin, D], [0] if dtype is None; and the sums over
    rows, [0] where not needed."""
    keys, terms = a.keys[begin:end], arguments["padded_terms_ptr"]
    blocks, tiles = triton.cdiv(arguments["rows"], launch.block_n), triton.cdiv(end - begin, launch.block_c)
    per_split = gemm.tiles_per_split(tiles, blocks, launch.together, most_splits(keys.numel()))
    splits = triton.cdiv(blocks, per_split)
    none = terms.new_empty((0,))
    grad = none if dtype is None else partial_gradients(splits, keys, dtype)
    kinds = need_bias + need_scale
    sums = terms.new_empty((splits, kinds, end - begin)) if kinds else None
    own = {
        "grad_ptr": None if dtype is None else grad,
        "sums_ptr": sums,
        "first_column": begin,
        "end_column": end,
        "blocks": blocks,
        "blocks_per_split": per_split,
        "SUM_BIAS": need_bias,
        "SUM_SCALE": need_scale,
    }
    launch_with(partitioned_logsumexp_grad_key_kernel, (tiles, splits), arguments | own, **launch.constants)
    return grad, add_sums_of_splits(sums, need_bias, need_scale, none)
