"""Backward kernels: the gradient of contiguous rows, and all gradients in tiles of any layout.

Bytes per logit (b = itemsize), without class vectors and scalars: 2b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._rows.triton_io import (
    Place,
    block_rows,
    body_gradient,
    body_tile,
    edge_gradient,
    load_soft_weights,
    read_edge,
    shift_logits,
    split_row,
    target_groups,
)
from ..._rows.triton_math import (
    INF,
    Slopes,
    affine,
    fast_exp,
    load_label,
    load_scale,
    load_slots,
    load_smooth_share,
    load_smooth_total,
    load_upstream,
    row_slopes,
)
from ..._rows.triton_options import KernelOptions, kernel_options, per_row
from ..._triton import launch_with
from ..arguments import DIFFERENTIABLE, Arguments
from . import launch as table
from .launch import Layout, in_place, layout_of, readable


class TileVectors(NamedTuple):
    """The class vectors of a tile's columns."""

    slope_x: Any  # du/dx
    class_bias: Any  # None if there is none
    weight: Any
    smooth_weight: Any
    class_scale: Any


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def margin_cross_entropy_own_logits_kernel(
    input_ptr,  # [N, C, K], unit class stride
    o,  # KernelOptions of class-index targets
    own_ptr,  # [1 or 2, N, K] float32
    rows,
    classes,
    positions,
    input_stride_n,
    input_stride_k,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Copy the logits of the targets' columns (of column 0 where there is none), one row per lane."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    row_ptr = input_ptr + row // positions * input_stride_n + row % positions * input_stride_k
    index = load_label(o.target_ptr + row, classes, ignore_index).index
    tl.store(own_ptr + row, tl.load(row_ptr + index).to(tl.float32), mask=inside)
    if o.mixed_target_ptr is not None:
        index = load_label(o.mixed_target_ptr + row, classes, ignore_index).index
        tl.store(own_ptr + rows + row, tl.load(row_ptr + index).to(tl.float32), mask=inside)


@triton.jit
def write_tile_gradient(
    at, body_ptr, q_body, grad_body_ptr, begin, peak, slopes, o, POLICY: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the body's tile from group ``begin`` on. POLICY: whether the cache should keep it."""
    WIDE: tl.constexpr = GROUP >= 4
    _, _, offsets, mask = body_tile(begin, at.groups, at.group_a, at.group_b, GROUP, LANES, REPEAT)
    x = tl.load(body_ptr + offsets, mask=mask, other=-INF, eviction_policy=POLICY).to(tl.float32)
    u = shift_logits(x, at.head, offsets, mask, o, at.scale, WIDE)
    e = fast_exp(u - peak)
    q = e
    if o.soft:
        q = load_soft_weights(q_body, offsets, at.head, offsets, mask, at.smooth_share, o, WIDE)
    dx = body_gradient(e, q, slopes, at.head, offsets, mask, o, at.scale, WIDE)
    tl.store(grad_body_ptr + offsets, dx.to(grad_body_ptr.dtype.element_ty), mask=mask, eviction_policy=POLICY)


@triton.jit(do_not_specialize=["ignore_index"])
def margin_cross_entropy_rows_backward_kernel(
    input_ptr,  # [N, C, K], unit class stride
    o,  # KernelOptions; probabilities with unit class stride
    rest_ptr,  # [2, N, K]
    soft_mass_ptr,  # [N, K] where the options are soft: sum of the soft weights
    grad_loss_ptr,  # 0-dim or [N, K]; 1 if None
    grad_lse_ptr,  # 0-dim or [N, K]
    own_ptr,  # [1 or 2, N, K] float32, the targets' own logits, where grad_ptr is input_ptr
    grad_ptr,  # [N, C, K], unit class stride
    classes,
    positions,
    input_stride_n,
    input_stride_k,
    target_stride_n,
    target_stride_k,
    grad_stride_n,
    grad_stride_k,
    grad_loss_stride,
    grad_lse_stride,
    ignore_index,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Compute the input's gradient, one program per row and tile of its body; the one of tile 0 also does the edge.

    Programs run in the order opposite to the pass before: the cache still holds what they visit first.
    """
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    rows = tl.num_programs(0)
    row = (rows - 1 - tl.program_id(0)).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    n, k = row // positions, row % positions
    offset, aligned, head, groups = split_row(n, k, input_stride_n, input_stride_k, classes, GROUP)
    grad_offset, grad_aligned, _, _ = split_row(n, k, grad_stride_n, grad_stride_k, classes, GROUP)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    smooth_share = load_smooth_share(o, classes)
    row_ptr = input_ptr + offset
    peak, mass, upstream, upstream_lse = load_upstream(
        rest_ptr, grad_loss_ptr, grad_lse_ptr, row, rows, grad_loss_stride, grad_lse_stride
    )
    q_offset, q_aligned = 0, 0
    group_a, group_b = -1, -1
    if o.soft:
        q_offset, q_aligned, _, _ = split_row(n, k, target_stride_n, target_stride_k, classes, GROUP)
        smooth = upstream
        if o.coefficient_ptr is not None:
            smooth = upstream * tl.load(o.coefficient_ptr)
        a, b = smooth, smooth  # not used
        slopes = Slopes((smooth * tl.load(soft_mass_ptr + row) + upstream_lse) / mass, smooth, None, None)
    else:
        smooth_total = load_smooth_total(o, classes)
        CLASS_STRIDE: tl.constexpr = 1 if own_ptr is None else 0
        row_ptr_a, row_ptr_b = row_ptr, row_ptr
        if own_ptr is not None:  # another program of this row, or another warp, may be done with the targets' columns
            row_ptr_a, row_ptr_b = own_ptr + row, own_ptr + rows + row
        a, b = load_slots(row_ptr_a, row, o, scale, classes, CLASS_STRIDE, ignore_index, row_ptr_b)
        group_a, group_b = target_groups(a.column, b.column, head, groups, MIXED, GROUP)
        slopes = row_slopes(peak, mass, a, b, upstream, upstream_lse, smooth_total, smooth_share, o)

    at = Place(row_ptr, head, groups, group_a, group_b, scale, smooth_share)
    if tile == 0:
        edge = read_edge(at, a, b, classes, o, GROUP)
        e = fast_exp(edge.u - peak)
        q = e
        if o.soft:
            q_row = o.target_ptr + q_offset
            q = load_soft_weights(q_row, edge.columns, 0, edge.columns, edge.mask, smooth_share, o, False)
        dx = edge_gradient(e, q, a, b, slopes, edge.columns, edge.mask, o, scale)
        tl.store(grad_ptr + grad_offset + edge.columns, dx.to(grad_ptr.dtype.element_ty), mask=edge.mask)

    write_tile_gradient(
        at, input_ptr + aligned, o.target_ptr + q_aligned, grad_ptr + grad_aligned, tile * (REPEAT * LANES), peak,
        slopes, o, "", GROUP, LANES, REPEAT,
    )  # fmt: skip


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def margin_cross_entropy_soft_mass_kernel(
    o,  # KernelOptions of [N, C, K] probabilities
    soft_mass_ptr,  # [N, K]
    classes,
    positions,
    target_stride_n,
    target_stride_c,
    target_stride_k,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum w_j ((1 - smoothing) q_j + smoothing / C) over the classes.

    ALIGN: see margin_cross_entropy_tiles_backward_kernel.
    """
    n, k, inside, row = block_rows(tl.program_id(0), positions, BLOCK_K)
    q_ptr = o.target_ptr + n * target_stride_n * ALIGN + k[None, :] * target_stride_k * ALIGN
    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for begin in range(0, classes, BLOCK_C):
        columns = begin + tl.arange(0, BLOCK_C)[:, None]
        mask = (columns < classes // ALIGN * ALIGN) & inside[None, :]
        offsets = columns.to(tl.int64) * target_stride_c
        total += load_soft_weights(q_ptr, offsets, 0, columns, mask, load_smooth_share(o, classes), o, False)
    tl.store(soft_mass_ptr + row, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def margin_cross_entropy_terms_kernel(
    input_ptr,  # [N, C, K]
    o,  # KernelOptions
    rest_ptr,  # [2, N, K]
    soft_mass_ptr,  # [N, K] where the options are soft: sum of the soft weights
    grad_loss_ptr,  # 0-dim or [N, K]
    grad_lse_ptr,  # 0-dim or [N, K]
    terms_ptr,  # [10, N, K]: slope, smooth; of each target what its column gives input, class_bias, margin and scale
    columns_ptr,  # [2, N, K] int32: the targets' columns, -1 for none
    rows,
    classes,
    positions,
    input_stride_n,
    input_stride_c,
    input_stride_k,
    grad_loss_stride,
    grad_lse_stride,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Compute the terms that the gradients of a row are made of, one row per lane."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    peak, mass, upstream, upstream_lse = load_upstream(
        rest_ptr, grad_loss_ptr, grad_lse_ptr, row, rows, grad_loss_stride, grad_lse_stride
    )
    size = tl.cast(rows, tl.int64)
    out_ptr = terms_ptr + row
    if o.soft:
        if o.coefficient_ptr is not None:
            upstream = upstream * tl.load(o.coefficient_ptr)
        slope = (upstream * tl.load(soft_mass_ptr + row) + upstream_lse) / mass
        tl.store(out_ptr, slope, mask=inside)
        tl.store(out_ptr + size, upstream + tl.zeros_like(slope), mask=inside)
    else:
        row_ptr = input_ptr + row // positions * input_stride_n + row % positions * input_stride_k
        a, b = load_slots(row_ptr, row, o, scale, classes, input_stride_c, ignore_index)
        slopes = row_slopes(
            peak, mass, a, b, upstream, upstream_lse, load_smooth_total(o, classes),
            load_smooth_share(o, classes), o,
        )  # fmt: skip
        tl.store(out_ptr, slopes.slope, mask=inside)
        tl.store(out_ptr + size, slopes.smooth, mask=inside)
        values_a = target_values(row_ptr, a, slopes.a, o, input_stride_c)
        if o.mixed_target_ptr is not None:
            values_b = target_values(row_ptr, b, slopes.b, o, input_stride_c)
            both = a.column == b.column  # one column for both targets
            store_values(out_ptr + 6 * size, columns_ptr + size + row, size, b.column, values_b, values_a, both, inside)
            store_values(out_ptr + 2 * size, columns_ptr + row, size, a.column, values_a, values_b, both, inside)
        else:
            store_values(out_ptr + 2 * size, columns_ptr + row, size, a.column, values_a, values_a, False, inside)


@triton.jit
def target_values(row_ptr, slot, gradient, o, class_stride):
    """Return what a target's column gives: d/d(class_scale_y x_y) over the scale, d/d(class_bias_y), d/d(margin_y) over
    the scale, and d/d(scale)."""
    index = tl.maximum(slot.column, 0).to(tl.int64)
    cosine = tl.load(row_ptr + index * class_stride).to(tl.float32)
    if o.class_scale_ptr is not None:
        cosine = cosine * tl.load(o.class_scale_ptr + index)
    plain, dv = gradient.plain, gradient.shifted
    return plain + dv * slot.dphi_dc, plain + dv, dv * slot.dphi_dm, plain * cosine + dv * slot.phi


@triton.jit
def store_values(out_ptr, column_ptr, size, column, values, others, both, inside):
    tl.store(column_ptr, column, mask=inside)
    for kind in tl.static_range(4):
        tl.store(out_ptr + kind * size, tl.where(both, values[kind] + others[kind], values[kind]), mask=inside)


@triton.jit
def place_terms(values, columns, column_a, column_b, terms_ptr, size, MIXED: tl.constexpr):
    """Return values with one kind of the targets' terms in their columns."""
    if MIXED:
        values = tl.where(columns == column_b, tl.load(terms_ptr + 4 * size)[None, :], values)
    return tl.where(columns == column_a, tl.load(terms_ptr)[None, :], values)


@triton.jit
def load_tile_vectors(columns, real, o, scale):
    """Load the class vectors of a tile's columns."""
    slope_x = scale  # du/dx
    class_scale = 1.0
    if o.class_scale_ptr is not None:
        class_scale = tl.load(o.class_scale_ptr + columns, mask=real, other=1.0)
        slope_x = scale * class_scale
    class_bias = None
    if o.class_bias_ptr is not None:
        class_bias = tl.load(o.class_bias_ptr + columns, mask=real, other=0.0)
    weight = 1.0
    if o.weight_ptr is not None and (o.smooth or o.soft):
        weight = tl.load(o.weight_ptr + columns, mask=real, other=0.0)
    smooth_weight = weight
    if o.smoothing_ptr is not None:
        smooth_weight = tl.load(o.smooth_weight_ptr + columns, mask=real, other=0.0)
    return TileVectors(slope_x, class_bias, weight, smooth_weight, class_scale)


@triton.jit
def store_sums(
    partial_ptr, sum_bias, sum_scale, sum_margin, sum_learned, scale, classes, NEED_BIAS: tl.constexpr,
    NEED_SCALE: tl.constexpr, NEED_MARGIN: tl.constexpr, NEED_LEARNED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store a program's sums over its rows in the order of their kinds."""
    NEEDED: tl.constexpr = NEED_BIAS + NEED_SCALE + NEED_MARGIN + NEED_LEARNED
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * NEEDED * classes + column
    if NEED_BIAS:
        tl.store(out_ptr, tl.sum(sum_bias, 1), mask=column < classes)
    if NEED_SCALE:
        tl.store(out_ptr + NEED_BIAS * classes, scale * tl.sum(sum_scale, 1), mask=column < classes)
    if NEED_MARGIN:
        tl.store(out_ptr + (NEED_BIAS + NEED_SCALE) * classes, scale * tl.sum(sum_margin, 1), mask=column < classes)
    if NEED_LEARNED:
        tl.store(
            out_ptr + (NEED_BIAS + NEED_SCALE + NEED_MARGIN) * classes,
            tl.sum(sum_learned, 1),
            mask=column < classes,
        )


@triton.jit(do_not_specialize=["rows", "blocks", "blocks_per_program"])
def margin_cross_entropy_tiles_backward_kernel(
    input_ptr,  # [N, C, K]
    o,  # KernelOptions; the targets are read if they are probabilities
    rest_ptr,  # [2, N, K]
    terms_ptr,  # [10, N, K], see margin_cross_entropy_terms_kernel
    columns_ptr,  # [2, N, K] int32
    grad_ptr,  # [N, C, K], gradient of input
    grad_target_ptr,  # [N, C, K], gradient of the probabilities
    partial_ptr,  # [programs, NEEDED, C]: sums over a program's rows for class_bias, class_scale, class_margin, scale
    rows,
    classes,
    positions,
    blocks,
    blocks_per_program,
    input_stride_n,
    input_stride_c,
    input_stride_k,
    target_stride_n,
    target_stride_c,
    target_stride_k,
    grad_stride_n,
    grad_stride_c,
    grad_stride_k,
    grad_target_stride_n,
    grad_target_stride_c,
    grad_target_stride_k,
    ALIGN: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_MARGIN: tl.constexpr,
    NEED_LEARNED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute all gradients, one program per BLOCK_C columns and ``blocks_per_program`` blocks of BLOCK_K rows.

    The strides of samples and rows are in units of ALIGN elements, and the classes are a multiple of ALIGN, so that
    the compiler knows the alignment. IN_PLACE: grad_ptr is input_ptr.
    """
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    NEEDED: tl.constexpr = NEED_BIAS + NEED_SCALE + NEED_MARGIN + NEED_LEARNED
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    real = columns < classes // ALIGN * ALIGN
    scale = load_scale(o.scale, o.learned_scale_ptr)
    size = tl.cast(rows, tl.int64)
    slope_x, class_bias, weight, smooth_weight, class_scale = load_tile_vectors(columns, real, o, scale)
    sum_bias = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)  # rows are added up at the end: no exchange in the loop
    sum_scale = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    sum_margin = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    sum_learned = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    first_block = tl.program_id(0) * blocks_per_program
    for block in range(first_block, tl.minimum(first_block + blocks_per_program, blocks)):
        n, k, inside, row = block_rows(block, positions, BLOCK_K)
        mask = real & inside[None, :]
        offsets = k[None, :] * input_stride_k * ALIGN + columns.to(tl.int64) * input_stride_c
        x = tl.load(input_ptr + n * input_stride_n * ALIGN + offsets, mask=mask, other=0.0).to(tl.float32)
        if o.scaled or o.class_scale_ptr is not None:
            u = affine(x, slope_x, class_bias)
        else:
            u = x if class_bias is None else x + class_bias
        u = u - tl.load(rest_ptr + row)[None, :]
        du = tl.load(terms_ptr + row)[None, :] * fast_exp(u)
        smooth = tl.load(terms_ptr + size + row)[None, :]
        if o.soft:
            offsets = k[None, :] * target_stride_k * ALIGN + columns.to(tl.int64) * target_stride_c
            q = tl.load(o.target_ptr + n * target_stride_n * ALIGN + offsets, mask=mask, other=0.0).to(tl.float32)
            if o.smoothing_ptr is not None:
                q = (1.0 - o.label_smoothing) * (weight * q) + smooth_weight
            elif o.smooth:
                q = weight * ((1.0 - o.label_smoothing) * q + load_smooth_share(o, classes))
            else:
                q = weight * q
            du -= smooth * q
            if grad_target_ptr is not None:
                log_mass = tl.log(tl.load(rest_ptr + size + row))[None, :]
                dq = smooth * (o.label_smoothing - 1.0) * (u - log_mass) * weight
                offsets = k[None, :] * grad_target_stride_k * ALIGN + columns.to(tl.int64) * grad_target_stride_c
                offsets += n * grad_target_stride_n * ALIGN
                tl.store(grad_target_ptr + offsets, dq.to(grad_target_ptr.dtype.element_ty), mask=mask)
        elif o.smooth:
            du -= smooth * smooth_weight
        through = du
        own_ptr = terms_ptr + 2 * size + row
        if not o.soft:
            column_a = tl.load(columns_ptr + row)[None, :]
            column_b = column_a
            if MIXED:
                column_b = tl.load(columns_ptr + size + row)[None, :]
            through = place_terms(du, columns, column_a, column_b, own_ptr, size, MIXED)
        if grad_ptr is not None:
            dx = through
            if o.scaled or o.class_scale_ptr is not None:
                dx = dx * slope_x
            offsets = k[None, :] * grad_stride_k * ALIGN + columns.to(tl.int64) * grad_stride_c
            if IN_PLACE and NEEDED > 0:  # of a small tile several threads have read the same logit for their sums
                tl.debug_barrier()
            tl.store(grad_ptr + n * grad_stride_n * ALIGN + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
        if NEED_BIAS:
            values = du
            if not o.soft:
                values = place_terms(du, columns, column_a, column_b, own_ptr + size, size, MIXED)
            sum_bias += tl.where(mask, values, 0.0)
        if NEED_SCALE:
            sum_scale += tl.where(mask, through * x, 0.0)
        if NEED_MARGIN:
            values = place_terms(tl.zeros_like(x), columns, column_a, column_b, own_ptr + 2 * size, size, MIXED)
            sum_margin += tl.where(mask, values, 0.0)
        if NEED_LEARNED:
            values = du * x
            if o.class_scale_ptr is not None:
                values = values * class_scale
            if not o.soft:
                values = place_terms(values, columns, column_a, column_b, own_ptr + 3 * size, size, MIXED)
            sum_learned += tl.where(mask, values, 0.0)
    if NEEDED > 0:
        store_sums(
            partial_ptr, sum_bias, sum_scale, sum_margin, sum_learned, scale, classes, NEED_BIAS, NEED_SCALE,
            NEED_MARGIN, NEED_LEARNED, BLOCK_C,
        )  # fmt: skip


# --- launchers -------------------------------------------------------------------------------------------------------


def launch_rows_backward(layout: Layout, arguments: dict[str, Any], rows: int, in_place: bool) -> None:
    """Launch the rows kernel of a backward pass; ``arguments`` may hold more than it takes."""
    input, options, own = arguments["input_ptr"], arguments["o"], None
    if in_place and not options.soft:
        # A row has several programs: all need the targets' own logits, which one of them writes over.
        own = arguments["rest_ptr"].new_empty((1 if options.mixed_target_ptr is None else 2, rows))
        launch_with(
            margin_cross_entropy_own_logits_kernel, (triton.cdiv(rows, 128),), arguments, own_ptr=own, rows=rows,
            BLOCK=128, num_warps=4,
        )  # fmt: skip
    arguments = arguments | {"own_ptr": own}
    launch = table.rows_backward_launch(input.shape[1], input.element_size(), layout.aligned)
    launch_with(margin_cross_entropy_rows_backward_kernel, (rows, launch.parts), arguments, **launch.constants)


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    rest: Tensor,
    a: Arguments,
    needs: list[bool],
    *,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of ``DIFFERENTIABLE``, each like its input; [0] where not needed.

    Upstream gradients are 0-dim or [N, K]. ``out``: where the input's is written, as in ``forward``.
    """
    n, classes, k = a.input.shape
    sources = [a.input, *(getattr(a.options, name) for name in DIFFERENTIABLE[1:])]
    if n * k == 0:
        grads = [torch.zeros_like(t) if need else rest.new_empty((0,)) for t, need in zip(sources, needs, strict=True)]
        return grads if out is None or not needs[0] else [out, *grads[1:]]
    grads = [rest.new_empty((0,)) for _ in needs]
    rest = rest.contiguous()
    x = readable(a.input)
    options = kernel_options(a.options)
    named = {"input": x, **({"target": options.target_ptr} if a.options.soft else {})}
    if needs[0]:
        named["grad"] = grads[0] = torch.empty_like(a.input) if out is None else out
    if needs[1]:
        named["grad_target"] = grads[1] = torch.empty_like(a.options.target)
    layout = layout_of(named, rows=not any(needs[1:]))
    per_loss, grad_loss_stride = per_row(grad_loss, rest.shape[1:])
    per_lse, grad_lse_stride = per_row(grad_lse, rest.shape[1:])
    with torch.cuda.device_of(x):
        arguments = {
            "input_ptr": x,
            "o": options,
            "rest_ptr": rest,
            "soft_mass_ptr": _sum_soft_weights(a, options) if a.options.soft else None,
            "grad_loss_ptr": per_loss,
            "grad_lse_ptr": per_lse,
            "grad_ptr": grads[0] if needs[0] else None,
            "classes": classes,
            "positions": layout.positions,
            "grad_loss_stride": grad_loss_stride,
            "grad_lse_stride": grad_lse_stride,
            "ignore_index": a.options.ignore_index,
        }
        if layout.rows:
            launch_rows_backward(layout, arguments | layout.strides_of("target", "grad"), n * k, in_place(x, out))
        else:
            _backward_tiles(a, layout, arguments, needs, grads, in_place(x, out))
    return grads


def _backward_tiles(
    a: Arguments, layout: Layout, arguments: dict[str, Any], needs: list[bool], grads: list[Tensor], in_place: bool
) -> None:
    """Launch the tiles kernels of a backward pass; the sums over rows go into ``grads``."""
    n, classes, k = a.input.shape
    rest, summed = arguments["rest_ptr"], needs[2:]
    arguments |= {
        "terms_ptr": rest.new_empty((10, n, k)),
        "columns_ptr": rest.new_empty((2, n, k), dtype=torch.int32),
        "rows": n * k,
    }
    launch_with(
        margin_cross_entropy_terms_kernel, (triton.cdiv(n * k, 128),), arguments | layout.strides, BLOCK=128,
        num_warps=4,
    )  # fmt: skip
    tiles = table.sums_launch(classes, layout.positions, layout.classes_contiguous)
    blocks = layout.samples * triton.cdiv(layout.positions, tiles.block_k)
    class_tiles = triton.cdiv(classes, tiles.block_c)
    per_program = table.blocks_per_program(blocks, class_tiles) if any(summed) else 1
    programs = triton.cdiv(blocks, per_program)
    partial = rest.new_empty((programs, sum(summed), classes)) if any(summed) else None
    align = layout.common_alignment(classes, a.input.element_size())
    launch_with(
        margin_cross_entropy_tiles_backward_kernel,
        (programs, class_tiles),
        arguments | layout.strides_of("target", "grad", "grad_target", align=align),
        grad_target_ptr=grads[1] if needs[1] else None,
        partial_ptr=partial,
        blocks=blocks,
        blocks_per_program=per_program,
        ALIGN=align,
        NEED_BIAS=needs[2],
        NEED_SCALE=needs[3],
        NEED_MARGIN=needs[4],
        NEED_LEARNED=needs[5],
        IN_PLACE=in_place,
        BLOCK_C=tiles.block_c,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
    )
    if partial is None:
        return
    for kind, position in enumerate(position for position in range(2, len(needs)) if needs[position]):
        # each a tensor of its own: compiled code counts on what the fake says, outputs that begin on 16 bytes
        grads[position] = partial[:, kind].sum(0)
    if needs[5]:
        grads[5] = a.options.scale * grads[5].sum()


def _sum_soft_weights(a: Arguments, options: KernelOptions) -> Tensor:
    """Return the sum of the soft weights of every row, [N, K]."""
    n, classes, k = a.input.shape
    mass = a.input.new_empty((n, k), dtype=torch.float32)
    layout = layout_of({"target": a.options.target}, rows=False)
    tiles = table.sums_launch(classes, layout.positions, layout.classes_contiguous)
    align = layout.common_alignment(classes, a.options.target.element_size())
    margin_cross_entropy_soft_mass_kernel[(layout.samples * triton.cdiv(layout.positions, tiles.block_k),)](
        o=options,
        soft_mass_ptr=mass,
        classes=classes,
        positions=layout.positions,
        ALIGN=align,
        BLOCK_C=tiles.block_c,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
        **layout.strides_of(align=align),
    )
    return mass
