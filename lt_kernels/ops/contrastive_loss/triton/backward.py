"""Gradients of a contrastive loss: tiles of products that are computed again, and blocks in memory.

Queries and keys are programs of one grid: neither waits for the other, and the last round of programs is shared. A
program does 4 D operations per element. Where the queries are the keys, one product per tile serves both:
dX_i = a sum_j (dS_ij + dS_ji) x_j.

A row's terms are for an upstream gradient of 1. What reaches the losses multiplies a query's gradient at the end, and a
key's too where it is the same for all rows.

Tiles' labels and terms are loaded within a condition that always holds: Triton pipelines all loads of a loop's body
that lead to a product, and would copy these to shared memory in 4 bytes at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..._gemm.triton_tiles import inner_products, load_left, load_right, split_tiles, store_gradient
from ..._rows.triton_math import INF, load_scale
from ...partitioned_logsumexp.triton.keys import (
    add_product,
    block_columns,
    load_columns,
    round_fma,
    round_gradient,
    scale_gradient,
)
from .forward import load_block_keys, load_pos_offset_of
from .keys import (
    FACTOR,
    OF_EXTRA,
    OF_PULLED,
    OF_SCALE,
    POS_FACTOR,
    POS_REFERENCE,
    PULL,
    REFERENCE,
    exponential,
    load_bias,
    load_pos_offset,
    load_row,
    load_tile,
    load_values,
    logits,
    make_keys,
    to_column,
)


class Upstream(NamedTuple):
    """What reaches the rows' losses, one argument of a kernel."""

    ptr: Any  # 0-dim or [N]
    share_ptr: Any  # 0-dim, what a row counts in the result; None: 1
    per_row: Any  # constexpr: whether ptr is [N]


class Terms(NamedTuple):
    """Where the terms of rows are, one argument of a kernel."""

    ptr: Any  # [N_TERMS, padded]
    rows: Any
    padded: Any


class RowTerms(NamedTuple):
    """The terms that rows' gradients are made of; 0 where they are not read."""

    label: Any
    reference: Any
    factor: Any
    pull: Any
    pos_reference: Any
    pos_factor: Any
    pos_offset: Any
    upstream: Any


@triton.jit
def load_upstream(g, row, rows, RAGGED: tl.constexpr):
    """Load what reaches the losses of rows; a scalar where it is the same for all."""
    upstream = load_values(g.ptr, row, rows, 0.0, RAGGED) if g.per_row else tl.load(g.ptr)
    upstream = upstream.to(tl.float32)
    if g.share_ptr is not None:
        upstream = upstream * tl.load(g.share_ptr)
    return upstream


@triton.jit
def no_terms(o, BLOCK: tl.constexpr):
    """Return terms that are not read."""
    zero = tl.zeros([BLOCK], tl.float32)
    return RowTerms(tl.zeros([BLOCK], o.query_label_ptr.dtype.element_ty), zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def load_terms(terms, row, o, g, RAGGED: tl.constexpr, UPSTREAM: tl.constexpr):
    """Load the terms of rows; those of rows past the end give 0 to every gradient. UPSTREAM: load what reaches them."""
    ptr, rows = terms.ptr, terms.rows
    size = tl.cast(terms.padded, tl.int64)
    factor = load_values(ptr + FACTOR * size, row, rows, 0.0, RAGGED)
    reference, pull, pos_reference, pos_factor = factor * 0.0, factor * 0.0, factor * 0.0, factor * 0.0
    if not o.bounded:
        reference = load_values(ptr + REFERENCE * size, row, rows, INF, RAGGED)
    if o.two:
        pos_factor = load_values(ptr + POS_FACTOR * size, row, rows, 0.0, RAGGED)
        if not o.bounded:
            pos_reference = load_values(ptr + POS_REFERENCE * size, row, rows, INF, RAGGED)
    else:
        pull = load_values(ptr + PULL * size, row, rows, 0.0, RAGGED)
    upstream = factor * 0.0
    if UPSTREAM and g.per_row:
        upstream = load_upstream(g, row, rows, RAGGED)
    label = load_values(o.query_label_ptr, row, rows, 0, RAGGED)
    pos_offset = load_pos_offset(o, row, rows, RAGGED)
    return RowTerms(label, reference, factor, pull, pos_reference, pos_factor, pos_offset, upstream)


@triton.jit
def choose_side(same, positive, negative, AXIS: tl.constexpr):
    """Return each element's side of the rows' values, which lie along the other axis than AXIS."""
    return tl.where(same, tl.expand_dims(positive, AXIS), tl.expand_dims(negative, AXIS))


@triton.jit
def product_gradient(z, same, keys, t, o, AXIS: tl.constexpr):
    """Return the gradient of the products z over the scale, for an upstream gradient of 1."""
    u = logits(z, same, keys, tl.expand_dims(t.pos_offset, AXIS), o)
    if o.two:
        e = exponential(u, choose_side(same, t.pos_reference, t.reference, AXIS), o)
        return e * choose_side(same, t.pos_factor, t.factor, AXIS)
    else:
        e = exponential(u, tl.expand_dims(t.reference, AXIS), o)
        return round_fma(e, tl.expand_dims(t.factor, AXIS), tl.where(same, tl.expand_dims(t.pull, AXIS), 0.0))


@triton.jit
def both_gradients(z, same, keys, t, other, o, g):
    """Return the sum of both gradients of the product of two vectors, each of which is a query of the other."""
    if g.per_row:
        dz = product_gradient(z, same, keys, t, o, 1) * t.upstream[:, None]
        return dz + product_gradient(z, same, keys, other, o, 0) * other.upstream[None, :]
    elif o.bounded and not o.two:  # one exponential serves both
        pull = t.pull[:, None] + other.pull[None, :]
        e = exponential(logits(z, same, keys, 0.0, o), 0.0, o)
        return round_fma(e, t.factor[:, None] + other.factor[None, :], tl.where(same, pull, 0.0))
    else:
        return product_gradient(z, same, keys, t, o, 1) + product_gradient(z, same, keys, other, o, 0)


@triton.jit
def own_tiles(split, per_split, size, BLOCK: tl.constexpr):
    """Return the first and the end of a split's tiles."""
    first = split * per_split
    return first, tl.minimum(first + per_split, tl.cdiv(size, BLOCK))


@triton.jit
def query_gradient(
    f, o, g, terms, grad_ptr, block, split, columns, per_split, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of queries through the columns of one split, in tiles [BLOCK, STEP]."""
    rows, first_row = terms.rows, block * BLOCK
    row = first_row + tl.arange(0, BLOCK)
    q = load_left(f, row, rows)
    own, low, high = load_row(o, row, rows, first_row, first_row + BLOCK - 1)
    t = load_terms(terms, row, o, g, True, False)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    grad = tl.zeros([BLOCK, f.block_d], tl.float32)
    first, end = own_tiles(split, per_split, columns, STEP)
    no_label, no_bias = tl.zeros([STEP], o.key_label_ptr.dtype.element_ty), tl.zeros([STEP], tl.float32)
    for tile in range(first, end):
        begin = tile * STEP
        column = begin + tl.arange(0, STEP)
        k = load_tile(f.right_ptr, f.right_stride, begin, columns, f, RAGGED, STEP)
        label, bias = no_label, no_bias
        if tile < end:
            label = load_values(o.key_label_ptr, column, columns, 0, RAGGED)
            bias = load_bias(o, column, columns, RAGGED)
        keys = make_keys(o, scale, label[None, :], bias[None, :])
        z = inner_products(q, k, f)
        dz = product_gradient(z, own.label[:, None] == keys.label, keys, t, o, 1)
        if (begin + STEP > columns) | ((low < begin + STEP) & (high >= begin)):
            out = (column >= columns)[None, :]
            if o.exclude_self or o.exclude_ptr is not None:
                out = out | (column[None, :] == own.exclude[:, None])
            dz = tl.where(out, 0.0, dz)
        grad = add_product(round_gradient(dz, scale, k), k, grad, f.precision)
    upstream = load_upstream(g, row, rows, True)
    if g.per_row:
        upstream = upstream[:, None]
    store_gradient(grad_ptr, upstream * scale_gradient(grad, scale, q), split, row, rows, f)


@triton.jit
def key_gradient(
    f, o, g, terms, grad_ptr, block, split, first_key, end_key, per_split, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of keys through the rows of one split, in tiles [BLOCK, STEP]."""
    begin = first_key + block * BLOCK
    column = begin + tl.arange(0, BLOCK)
    k = load_right(f, column, end_key)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    label, bias = load_values(o.key_label_ptr, column, end_key, 0, True), load_bias(o, column, end_key, True)
    keys = make_keys(o, scale, label[:, None], bias[:, None])
    grad = tl.zeros([BLOCK, f.block_d], tl.float32)
    rows = terms.rows
    first, end = own_tiles(split, per_split, rows, STEP)
    nothing = no_terms(o, STEP)
    for tile in range(first, end):
        first_row = tile * STEP
        row = first_row + tl.arange(0, STEP)
        q = load_tile(f.left_ptr, f.left_stride, first_row, rows, f, RAGGED, STEP)
        t = nothing
        if tile < end:
            t = load_terms(terms, row, o, g, RAGGED, True)
        z = inner_products(k, q, f)
        dz = product_gradient(z, keys.label == t.label[None, :], keys, t, o, 0)
        if o.exclude_ptr is not None:
            exclude = to_column(load_values(o.exclude_ptr, row, rows, -1, RAGGED))
            dz = tl.where(column[:, None] == exclude[None, :], 0.0, dz)
        elif o.exclude_self:
            if (first_row < begin + BLOCK) & (first_row + STEP > begin):
                dz = tl.where(column[:, None] == row[None, :], 0.0, dz)
        if g.per_row:
            dz = dz * t.upstream[None, :]
        grad = add_product(round_gradient(dz, scale, q), q, grad, f.precision)
    if not g.per_row:
        grad = load_upstream(g, 0, 1, False) * grad
    store_gradient(grad_ptr, scale_gradient(grad, scale, k), split, column - first_key, end_key - first_key, f)


@triton.jit(
    do_not_specialize=[
        "columns", "first_key", "end_key", "query_blocks", "query_programs", "tiles_per_split", "key_blocks",
        "blocks_per_split",
    ]
)  # fmt: skip
def contrastive_loss_gradients_kernel(
    f,  # Factors: queries and keys
    o,  # LossOptions
    g,  # Upstream
    terms,  # Terms
    grad_query_ptr,  # [splits, N, D]; None where not needed
    grad_key_ptr,  # [splits, end - first, D]; None where not needed
    columns,
    first_key,  # keys from here ...
    end_key,  # ... to here receive a gradient
    query_blocks,
    query_programs,  # the first programs are those of queries
    tiles_per_split,
    key_blocks,
    blocks_per_split,
    RAGGED: tl.constexpr,  # whether the last tile of keys or of queries is not full
    BLOCK_N: tl.constexpr,  # vectors of a program
    BLOCK_C: tl.constexpr,  # vectors of a tile
):
    """Compute the gradients of a block of queries or of a block of keys."""
    program = tl.program_id(0)
    if grad_query_ptr is not None:
        if program < query_programs:
            query_gradient(
                f, o, g, terms, grad_query_ptr, program % query_blocks, program // query_blocks, columns,
                tiles_per_split, RAGGED, BLOCK_N, BLOCK_C,
            )  # fmt: skip
    if grad_key_ptr is not None:
        if program >= query_programs:
            program -= query_programs
            key_gradient(
                f, o, g, terms, grad_key_ptr, program % key_blocks, program // key_blocks, first_key, end_key,
                blocks_per_split, RAGGED, BLOCK_N, BLOCK_C,
            )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "tiles_per_split"])
def contrastive_loss_both_kernel(
    f,  # Factors; the queries are the keys too
    o,  # LossOptions, likewise
    g,  # Upstream
    terms,  # Terms
    grad_query_ptr,  # [splits, N, D]
    blocks,
    tiles_per_split,
    RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of a block of queries that are the keys too, through their rows and their columns."""
    rows, first_row = terms.rows, tl.program_id(0) % blocks * BLOCK_N
    split = tl.program_id(0) // blocks
    row = first_row + tl.arange(0, BLOCK_N)
    x = load_left(f, row, rows)
    t = load_terms(terms, row, o, g, True, True)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    keys = make_keys(o, scale, t.label[:, None], 0.0)
    grad = tl.zeros([BLOCK_N, f.block_d], tl.float32)
    first, end = own_tiles(split, tiles_per_split, rows, BLOCK_C)
    nothing = no_terms(o, BLOCK_C)
    for tile in range(first, end):
        begin = tile * BLOCK_C
        column = begin + tl.arange(0, BLOCK_C)
        y = load_tile(f.left_ptr, f.left_stride, begin, rows, f, RAGGED, BLOCK_C)
        other = nothing
        if tile < end:
            other = load_terms(terms, column, o, g, RAGGED, True)
        z = inner_products(x, y, f)
        dz = both_gradients(z, keys.label == other.label[None, :], keys, t, other, o, g)
        partly = begin + BLOCK_C > rows
        if o.exclude_self:
            partly = partly | ((first_row < begin + BLOCK_C) & (first_row + BLOCK_N > begin))
        if partly:
            out = (column >= rows)[None, :]
            if o.exclude_self:
                out = out | (column[None, :] == row[:, None])
            dz = tl.where(out, 0.0, dz)
        grad = add_product(round_gradient(dz, scale, y), y, grad, f.precision)
    if not g.per_row:
        grad = load_upstream(g, 0, 1, False) * grad
    store_gradient(grad_query_ptr, scale_gradient(grad, scale, x), split, row, rows, f)


# --- blocks ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["columns", "first_row", "end_row", "first_column", "blocks_per_split"])
def contrastive_loss_block_backward_kernel(
    z_ptr,  # [n, m], unit stride along m
    o,  # LossOptions
    g,  # Upstream
    terms,  # Terms
    dz_ptr,  # [n, m], unit stride along m
    columns,  # m
    first_row,  # rows of the block, of all
    end_row,
    first_column,
    blocks_per_split,
    z_stride,
    dz_stride,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute the gradients of the products of one block of columns with the rows of one split, ROWS at a time."""
    own = block_columns(tl.program_id(0) * (LANES * GROUP), columns, GROUP, LANES)
    column = own.index
    scale = load_scale(o.scale, o.learned_scale_ptr)
    keys = load_block_keys(o, scale, own, first_column)
    rows = end_row - first_row
    size = tl.cast(terms.padded, tl.int64)
    _, first, end = split_tiles(blocks_per_split, rows, ROWS)
    for block in range(first, end):
        zs = ()
        for r in tl.static_range(ROWS):
            index = tl.minimum(block * ROWS + r, rows - 1).to(tl.int64)
            zs = zs + (load_columns(z_ptr + index * z_stride, own, 0.0),)  # noqa: RUF005
        for r in tl.static_range(ROWS):
            inside = block * ROWS + r < rows
            index = tl.minimum(block * ROWS + r, rows - 1)
            row = first_row + index
            z = zs[r].to(tl.float32)
            same = tl.load(o.query_label_ptr + row) == keys.label
            u = logits(z, same, keys, load_pos_offset_of(o, row), o)
            own_ptr = terms.ptr + row
            reference, factor = tl.load(own_ptr + REFERENCE * size), tl.load(own_ptr + FACTOR * size)
            if o.two:
                reference = tl.where(same, tl.load(own_ptr + POS_REFERENCE * size), reference)
                factor = tl.where(same, tl.load(own_ptr + POS_FACTOR * size), factor)
                dz = exponential(u, reference, o) * factor
            else:
                pull = tl.where(same, tl.load(own_ptr + PULL * size), 0.0)
                dz = round_fma(exponential(u, reference, o), factor, pull)
            if o.exclude_self:
                dz = tl.where(first_column + column == row, 0.0, dz)
            elif o.exclude_ptr is not None:
                dz = tl.where(first_column + column == tl.load(o.exclude_ptr + row), 0.0, dz)
            dz = (dz * (scale * load_upstream(g, row, end_row, False))).to(dz_ptr.dtype.element_ty)
            dz_ptrs = dz_ptr + index.to(tl.int64) * dz_stride + column
            tl.store(dz_ptrs, dz, mask=own.whole & inside)
            if own.has_edge:
                tl.store(dz_ptrs, dz, mask=own.edge & inside)


# --- sums of splits --------------------------------------------------------------------------------------------------


class Partial(NamedTuple):
    """Gradients of vectors that splits have computed, one argument of a kernel."""

    ptr: Any  # [splits, size]
    splits: Any
    size: Any


@triton.jit
def sum_splits(p, index, inside):
    """Return the sum of all splits' elements, in a fixed order."""
    total = tl.zeros(index.shape, tl.float32)
    ptr = p.ptr + index
    size = tl.cast(p.size, tl.int64)
    for first in range(0, p.splits, 4):
        for i in tl.static_range(4):
            split = first + i
            total += tl.load(ptr + split * size, mask=inside & (split < p.splits), other=0.0).to(tl.float32)
    return total


@triton.jit
def row_gradients(g, terms, of_extra_ptr, of_pulled_ptr, of_scale_ptr, scale, BLOCK: tl.constexpr):
    """Compute the gradients of the rows' other inputs and of the learned scale."""
    size = tl.cast(terms.padded, tl.int64)
    of_scale = tl.zeros([BLOCK], tl.float32)
    for first in range(0, terms.rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < terms.rows
        upstream = load_upstream(g, row, terms.rows, True)
        if of_extra_ptr is not None:
            value = tl.load(terms.ptr + OF_EXTRA * size + row, mask=inside, other=0.0)
            tl.store(of_extra_ptr + row, upstream * value, mask=inside)
        if of_pulled_ptr is not None:
            value = tl.load(terms.ptr + OF_PULLED * size + row, mask=inside, other=0.0)
            tl.store(of_pulled_ptr + row, upstream * value, mask=inside)
        if of_scale_ptr is not None:
            of_scale += upstream * tl.load(terms.ptr + OF_SCALE * size + row, mask=inside, other=0.0)
    if of_scale_ptr is not None:
        tl.store(of_scale_ptr, scale * tl.sum(of_scale, 0))


@triton.jit(do_not_specialize=["key_begin", "key_end", "query_programs", "key_programs"])
def contrastive_loss_finish_kernel(
    g,  # Upstream
    terms,  # Terms
    query,  # Partial of the queries; its pointer is None where not needed
    key,  # Partial of the keys that receive a gradient, likewise
    grad_query_ptr,  # [N, D]
    grad_key_ptr,  # [M, D]; None: the keys' gradient is part of the queries', which they are rows of
    of_extra_ptr,  # [N]; None where not needed, like the next two
    of_pulled_ptr,
    of_scale_ptr,
    scale,  # what the learned scale multiplies
    query_size,  # elements
    key_size,
    key_begin,  # elements of the keys from here ...
    key_end,  # ... to here receive a gradient; the others are 0
    query_programs,  # the first programs, then those of keys, and one for the rows' other inputs
    key_programs,
    BLOCK: tl.constexpr,
):
    """Add up the splits of gradients, and compute those of the rows' other inputs."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if query.ptr is not None:
        if program < query_programs:
            index = program.to(tl.int64) * BLOCK + lane
            total = sum_splits(query, index, index < query_size)
            if key.ptr is not None:
                if grad_key_ptr is None:
                    total += sum_splits(key, index - key_begin, (index >= key_begin) & (index < key_end))
            tl.store(grad_query_ptr + index, total.to(grad_query_ptr.dtype.element_ty), mask=index < query_size)
    if grad_key_ptr is not None:
        if (program >= query_programs) & (program < query_programs + key_programs):
            index = (program - query_programs).to(tl.int64) * BLOCK + lane
            total = sum_splits(key, index - key_begin, (index >= key_begin) & (index < key_end))
            tl.store(grad_key_ptr + index, total.to(grad_key_ptr.dtype.element_ty), mask=index < key_size)
    if of_extra_ptr is not None or of_pulled_ptr is not None or of_scale_ptr is not None:
        if program == query_programs + key_programs:
            row_gradients(g, terms, of_extra_ptr, of_pulled_ptr, of_scale_ptr, scale, BLOCK)
