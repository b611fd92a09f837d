"""Forward kernels: rows (the classes of a row are contiguous) and tiles (any layout, and rows of few classes).

With ``peak`` and ``mass`` the maximum and the sum of exp(u - peak) over the columns that are no target of the row
(together ``rest`` [2, N, K], which backward reads too), everything else of a row is scalar arithmetic on its targets'
logits. The gradient of an ordinary column is

    d loss / d x_j = a_j (slope * exp(u_j - peak) - smooth * w_j)            a_j = scale * class_scale_j

Bytes per logit (b = itemsize), without class vectors and scalars: b, and 2b with the gradient. The row stays in
registers up to 32,768 classes; beyond, its second read should hit L2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._rows.triton_io import (
    REPEAT_AXIS,
    Place,
    best_groups,
    best_of_lanes,
    block_rows,
    body_gradient,
    body_tile,
    edge_gradient,
    find_group,
    lane_sum,
    load_soft_weights,
    merge_online_lse,
    ordinary_gradient,
    read_edge,
    repeat_lanes,
    shift_logits,
    split_row,
    target_groups,
    undo_scale,
    weigh,
)
from ..._rows.triton_math import (
    INF,
    NO_COLUMN,
    Slopes,
    Statistics,
    TargetValues,
    fast_exp,
    finite_reference,
    first_best,
    largest,
    load_factor,
    load_label,
    load_scale,
    load_slots,
    load_smooth_share,
    load_smooth_total,
    merge_best,
    place_targets,
    rescale_sums,
    row_loss,
    row_slopes,
    same_number,
    start_sums,
    target_gradient,
    times_weight,
)
from ..._rows.triton_options import kernel_options
from ..._triton import launch_with
from ..arguments import Arguments
from . import launch as table
from .backward import launch_rows_backward, write_tile_gradient
from .launch import Layout, in_place, layout_of, readable


class BodyTile(NamedTuple):
    """A row's body as one tile."""

    offsets: Any
    mask: Any
    e: Any  # exp(u - peak)
    q: Any  # soft weights, where the options are soft


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def sum_body(
    at, body_ptr, q_body, begin, end, o, PREDICT: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):  # fmt: skip
    """Return the statistics of the body's groups ``begin`` to ``end``."""
    WIDE: tl.constexpr = GROUP >= 4
    peaks, masses, weighteds, visiteds, bests, groups_of_bests = start_sums(tl.zeros([LANES], tl.float32))
    for first in range(begin, end, REPEAT * LANES):
        group, inside, offsets, mask = body_tile(first, end, at.group_a, at.group_b, GROUP, LANES, REPEAT)
        x = tl.load(body_ptr + offsets, mask=mask, other=-INF, eviction_policy="evict_last").to(tl.float32)
        u = shift_logits(x, at.head, offsets, mask, o, at.scale, WIDE)
        peaks, masses, weighteds, z = merge_online_lse(u, peaks, masses, weighteds, visiteds)
        if o.soft:
            q = load_soft_weights(q_body, offsets, at.head, offsets, mask, at.smooth_share, o, WIDE)
            weighteds += lane_sum(tl.where(mask, times_weight(q, z, o), 0.0))
            visiteds += lane_sum(q)
        elif o.smooth:
            weighteds += lane_sum(weigh(z, at.head, offsets, mask, o, WIDE))
            if o.smooth_weight_ptr is not None:
                ones = tl.full(x.shape, 1.0, tl.float32)
                visiteds += lane_sum(weigh(ones, at.head, offsets, mask, o, WIDE))
            else:
                visiteds += tl.sum(inside.to(tl.float32), REPEAT_AXIS) * GROUP
        if PREDICT:
            tile_best, tile_group = best_groups(x, group, inside)
            bests, groups_of_bests = merge_best(bests, groups_of_bests, tile_best, tile_group)
    peak = tl.max(peaks, 0)
    masses, weighteds = rescale_sums(peaks, masses, weighteds, visiteds, peak)
    best, column = peak, at.head  # not used
    if PREDICT:
        best, column = best_of_lanes(body_ptr, at.head, bests, groups_of_bests, GROUP)
    return Statistics(peak, tl.sum(masses, 0), tl.sum(weighteds, 0), tl.sum(visiteds, 0), best, column)


@triton.jit
def merge_parts(
    partial_ptr,  # [4 or 5, rows, parts]
    partial_column_ptr,  # [rows, parts] int32
    row,
    rows,
    parts,
    PREDICT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return the statistics of a row from those of its parts."""
    part = tl.arange(0, PARTS)
    mask = part < parts
    offsets = row * parts + part
    size = tl.cast(rows, tl.int64) * parts
    peaks = tl.load(partial_ptr + offsets, mask=mask, other=-INF)
    masses = tl.load(partial_ptr + size + offsets, mask=mask, other=0.0)
    weighteds = tl.zeros([PARTS], tl.float32)
    visiteds = tl.zeros([PARTS], tl.float32)
    if WEIGHTED:
        weighteds = tl.load(partial_ptr + 2 * size + offsets, mask=mask, other=0.0)
        visiteds = tl.load(partial_ptr + 3 * size + offsets, mask=mask, other=0.0)
    peak = tl.max(peaks, 0)
    masses, weighteds = rescale_sums(peaks, masses, weighteds, visiteds, peak)
    best, column = peak, part  # not used
    if PREDICT:
        bests = tl.load(partial_ptr + 4 * size + offsets, mask=mask, other=-INF)
        columns = tl.load(partial_column_ptr + offsets, mask=mask, other=NO_COLUMN)
        best = largest(bests, 0)
        column = tl.min(tl.where(same_number(bests, best), columns, NO_COLUMN), 0)
    return Statistics(peak, tl.sum(masses, 0), tl.sum(weighteds, 0), tl.sum(visiteds, 0), best, column)


@triton.jit(do_not_specialize=["ignore_index", "part_groups"])
def margin_cross_entropy_rows_statistics_kernel(
    input_ptr,  # [N, C, K], unit class stride
    o,  # KernelOptions; probabilities with unit class stride
    partial_ptr,  # [4 or 5, rows, parts]: Statistics without the column
    partial_column_ptr,  # [rows, parts] int32
    classes,
    positions,
    part_groups,
    input_stride_n,
    input_stride_k,
    target_stride_n,
    target_stride_k,
    ignore_index,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Sum one part of a row's body; margin_cross_entropy_rows_forward_kernel merges the parts."""
    PREDICT: tl.constexpr = partial_column_ptr is not None
    rows, parts = tl.num_programs(0), tl.num_programs(1)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, k = row // positions, row % positions
    offset, aligned, head, groups = split_row(n, k, input_stride_n, input_stride_k, classes, GROUP)
    q_body = o.target_ptr
    group_a, group_b = -1, -1
    if o.soft:
        _, q_aligned, _, _ = split_row(n, k, target_stride_n, target_stride_k, classes, GROUP)
        q_body = o.target_ptr + q_aligned
    else:
        group_a = find_group(load_label(o.target_ptr + row, classes, ignore_index).column, head, groups, GROUP)
        if o.mixed_target_ptr is not None:
            column = load_label(o.mixed_target_ptr + row, classes, ignore_index).column
            group_b = find_group(column, head, groups, GROUP)
    begin = part * part_groups
    end = tl.minimum(begin + part_groups, groups)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    at = Place(input_ptr + offset, head, groups, group_a, group_b, scale, load_smooth_share(o, classes))
    found = sum_body(at, input_ptr + aligned, q_body, begin, end, o, PREDICT, GROUP, LANES, REPEAT)
    out_ptr = partial_ptr + row * parts + part
    size = tl.cast(rows, tl.int64) * parts
    tl.store(out_ptr, found.peak)
    tl.store(out_ptr + size, found.mass)
    if o.soft or o.smooth:
        tl.store(out_ptr + 2 * size, found.weighted)
        tl.store(out_ptr + 3 * size, found.visited)
    if PREDICT:
        tl.store(out_ptr + 4 * size, found.best)
        tl.store(partial_column_ptr + row * parts + part, found.column)


@triton.jit
def sum_one_tile(
    at, body_ptr, q_body, edge_peak, o, PREDICT: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):  # fmt: skip
    """Return the statistics of a body that is one tile, relative to the maximum of body and edge, and the tile."""
    WIDE: tl.constexpr = GROUP >= 4
    group, inside, offsets, mask = body_tile(0, at.groups, at.group_a, at.group_b, GROUP, LANES, REPEAT)
    x = tl.load(body_ptr + offsets, mask=mask, other=-INF).to(tl.float32)
    u = shift_logits(x, at.head, offsets, mask, o, at.scale, WIDE)
    peak = finite_reference(tl.maximum(edge_peak, tl.max(tl.max(tl.max(u, 2), 0), 0)))
    e = fast_exp(u - peak)
    mass = tl.sum(lane_sum(e), 0)
    weighted, visited, q = 0.0, 0.0, e
    if o.soft:
        q = load_soft_weights(q_body, offsets, at.head, offsets, mask, at.smooth_share, o, WIDE)
        visited = tl.sum(lane_sum(q), 0)
        weighted = tl.sum(lane_sum(tl.where(mask, times_weight(q, u - peak, o), 0.0)), 0)
    elif o.smooth:
        weighted = tl.sum(lane_sum(weigh(u - peak, at.head, offsets, mask, o, WIDE)), 0)
    best, column = peak, at.head  # not used
    if PREDICT:
        bests, groups_of_bests = best_groups(x, group, inside)
        best, column = best_of_lanes(body_ptr, at.head, bests, groups_of_bests, GROUP)
    return Statistics(peak, mass, weighted, visited, best, column), BodyTile(offsets, mask, e, q)


@triton.jit
def finish_row(at, q_row, peak, mass, weighted, visited, edge, a, b, factor, smooth_total, o):
    """Add the edge to the body's sums. Return them, the edge's exponentials and soft weights, loss and log-sum-exp."""
    e_edge = fast_exp(tl.where(edge.rest, edge.u, -INF) - peak)
    mass += tl.sum(e_edge, 0)
    q_edge = e_edge
    if o.soft:
        q_edge = load_soft_weights(q_row, edge.columns, 0, edge.columns, edge.mask, at.smooth_share, o, False)
        visited += tl.sum(q_edge, 0)
        weighted += tl.sum(tl.where(edge.mask, times_weight(q_edge, edge.u - peak, o), 0.0), 0)
        log_mass = tl.log(mass)
        loss, lse = factor * (visited * log_mass - weighted), peak + log_mass
    else:
        if o.smooth:
            weighted += tl.sum(weigh(edge.u - peak, 0, edge.columns, edge.rest, o, False), 0)
        loss, lse = row_loss(peak, mass, weighted, a, b, smooth_total, at.smooth_share, o)
    return mass, visited, e_edge, q_edge, loss, lse


@triton.jit
def write_body_gradient(
    at, body_ptr, q_body, grad_body_ptr, peak, slopes, o, GROUP: tl.constexpr, LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a body of several tiles. The last tile comes first: it was read last, so that it is in the
    cache if anything is."""
    tiles = (at.groups + (REPEAT * LANES - 1)) // (REPEAT * LANES)
    for visit in range(tiles):
        begin = (tiles - 1 - visit) * (REPEAT * LANES)
        write_tile_gradient(
            at, body_ptr, q_body, grad_body_ptr, begin, peak, slopes, o, "evict_first", GROUP, LANES, REPEAT
        )


@triton.jit(do_not_specialize=["ignore_index", "parts"])
def margin_cross_entropy_rows_forward_kernel(
    input_ptr,  # [N, C, K], unit class stride
    o,  # KernelOptions; probabilities with unit class stride
    partial_ptr,  # [4 or 5, rows, parts]: the body's statistics where BODY is "parts"
    partial_column_ptr,  # [rows, parts] int32
    loss_ptr,  # [N, K]
    lse_ptr,  # [N, K]
    prediction_ptr,  # [N, K] int64
    rest_ptr,  # [2, N, K]
    soft_mass_ptr,  # [N, K]: sum of the soft weights
    grad_ptr,  # [N, C, K], unit class stride
    classes,
    positions,
    parts,
    input_stride_n,
    input_stride_k,
    target_stride_n,
    target_stride_k,
    grad_stride_n,
    grad_stride_k,
    ignore_index,
    BODY: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    PARTS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Compute a row's results, one program per row.

    BODY: one "tile" that stays in registers; a "loop" over tiles, twice if there is a gradient; or "parts", which
    margin_cross_entropy_rows_statistics_kernel has summed. IN_PLACE: grad_ptr is input_ptr.
    """
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    PREDICT: tl.constexpr = prediction_ptr is not None
    rows = tl.num_programs(0)
    row = tl.program_id(0).to(tl.int64)
    n, k = row // positions, row % positions
    offset, aligned, head, groups = split_row(n, k, input_stride_n, input_stride_k, classes, GROUP)
    q_row, q_body = o.target_ptr, o.target_ptr
    scale = load_scale(o.scale, o.learned_scale_ptr)
    smooth_share = load_smooth_share(o, classes)
    row_ptr, body_ptr = input_ptr + offset, input_ptr + aligned
    group_a, group_b = -1, -1
    if o.soft:
        q_offset, q_aligned, _, _ = split_row(n, k, target_stride_n, target_stride_k, classes, GROUP)
        q_row, q_body = o.target_ptr + q_offset, o.target_ptr + q_aligned
        factor = load_factor(o)
        a, b, smooth_total = factor, factor, factor  # not used
    else:
        smooth_total = load_smooth_total(o, classes)
        factor = smooth_total  # not used
        a, b = load_slots(row_ptr, row, o, scale, classes, 1, ignore_index)
        group_a, group_b = target_groups(a.column, b.column, head, groups, MIXED, GROUP)

    at = Place(row_ptr, head, groups, group_a, group_b, scale, smooth_share)
    edge = read_edge(at, a, b, classes, o, GROUP)
    peak = tl.max(tl.where(edge.rest, edge.u, -INF), 0)

    if BODY == "tile":
        found, tile = sum_one_tile(at, body_ptr, q_body, peak, o, PREDICT, GROUP, LANES, REPEAT)
        peak, mass, weighted = found.peak, found.mass, found.weighted
    else:
        if BODY == "loop":
            found = sum_body(at, body_ptr, q_body, 0, groups, o, PREDICT, GROUP, LANES, REPEAT)
        else:
            found = merge_parts(partial_ptr, partial_column_ptr, row, rows, parts, PREDICT, o.soft or o.smooth, PARTS)
        peak = tl.maximum(peak, found.peak)
        mass, weighted = rescale_sums(found.peak, found.mass, found.weighted, found.visited, peak)
        peak = finite_reference(peak)
    if PREDICT:
        edge_best, edge_column = first_best(edge.x, edge.columns, edge.mask)
        _, prediction = merge_best(edge_best, edge_column, found.best, found.column)
        tl.store(prediction_ptr + row, prediction.to(tl.int64))

    mass, visited, e_edge, q_edge, loss, lse = finish_row(
        at, q_row, peak, mass, weighted, found.visited, edge, a, b, factor, smooth_total, o
    )
    if o.soft and soft_mass_ptr is not None:
        tl.store(soft_mass_ptr + row, visited)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(rest_ptr + row, peak)
    tl.store(rest_ptr + rows + row, mass)

    if grad_ptr is not None:
        if IN_PLACE:  # from here on, each thread reads only what it will write itself
            tl.debug_barrier()
        grad_offset, grad_aligned, _, _ = split_row(n, k, grad_stride_n, grad_stride_k, classes, GROUP)
        if o.soft:
            slopes = Slopes(factor * visited / mass, factor, None, None)
        else:
            slopes = row_slopes(peak, mass, a, b, 1.0, 0.0, smooth_total, at.smooth_share, o)
        dx = edge_gradient(e_edge, q_edge, a, b, slopes, edge.columns, edge.mask, o, scale)
        tl.store(grad_ptr + grad_offset + edge.columns, dx.to(grad_ptr.dtype.element_ty), mask=edge.mask)
        if BODY == "tile":
            dx = body_gradient(tile.e, tile.q, slopes, head, tile.offsets, tile.mask, o, scale, GROUP >= 4)
            tl.store(grad_ptr + grad_aligned + tile.offsets, dx.to(grad_ptr.dtype.element_ty), mask=tile.mask)
        else:
            grad_body_ptr = grad_ptr + grad_aligned
            write_body_gradient(at, body_ptr, q_body, grad_body_ptr, peak, slopes, o, GROUP, LANES, REPEAT)


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_columns(begin, REPEAT: tl.constexpr, LANES: tl.constexpr):
    return repeat_lanes(begin, REPEAT, LANES)[:, :, None]


@triton.jit
def sum_tiles(
    tile_ptr, q_ptr, a, b, inside, classes, input_stride_c, target_stride_c, smooth_share, o, scale,
    PREDICT: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the statistics of BLOCK_K rows over all tiles, and the lanes' largest logits."""
    BLOCK_C: tl.constexpr = REPEAT * LANES
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    peaks, masses, weighteds, visiteds, bests, best_columns = start_sums(tl.zeros([LANES, BLOCK_K], tl.float32))
    for begin in range(0, classes, BLOCK_C):
        columns = tile_columns(begin, REPEAT, LANES)
        real = columns < classes
        mask = real & inside[None, None, :]
        offsets = columns.to(tl.int64) * input_stride_c
        x = tl.load(tile_ptr + offsets, mask=mask, other=-INF, eviction_policy="evict_last").to(tl.float32)
        u = shift_logits(x, 0, columns, real, o, scale, False)
        counted = mask
        if not o.soft:
            counted = counted & (columns != a.column[None, None, :])
            if MIXED:
                counted = counted & (columns != b.column[None, None, :])
            u = tl.where(counted, u, -INF)
        before = peaks
        peaks = tl.maximum(peaks, tl.max(u, REPEAT_AXIS))
        masses, weighteds = rescale_sums(before, masses, weighteds, visiteds, peaks)
        z = u - tl.expand_dims(finite_reference(peaks), REPEAT_AXIS)
        masses += tl.sum(fast_exp(z), REPEAT_AXIS)
        if o.soft:
            q_offsets = columns.to(tl.int64) * target_stride_c
            q = load_soft_weights(q_ptr, q_offsets, 0, columns, mask, smooth_share, o, False)
            weighteds += tl.sum(tl.where(mask, times_weight(q, z, o), 0.0), REPEAT_AXIS)
            visiteds += tl.sum(q, REPEAT_AXIS)
        elif o.smooth:
            weighteds += tl.sum(weigh(z, 0, columns, counted, o, False), REPEAT_AXIS)
            ones = tl.full(x.shape, 1.0, tl.float32)
            visiteds += tl.sum(weigh(ones, 0, columns, counted, o, False), REPEAT_AXIS)
        if PREDICT:
            tile_bests = largest(x, REPEAT_AXIS)  # what is masked is -inf, and no earlier column
            has_it = same_number(x, tl.expand_dims(tile_bests, REPEAT_AXIS))
            first = tl.min(tl.where(has_it, columns, NO_COLUMN), REPEAT_AXIS)
            bests, best_columns = merge_best(bests, best_columns, tile_bests, first)
    peak = tl.max(peaks, 0)
    masses, weighteds = rescale_sums(peaks, masses, weighteds, visiteds, peak[None, :])
    peak = finite_reference(peak)
    return (
        Statistics(peak, tl.sum(masses, 0), tl.sum(weighteds, 0), tl.sum(visiteds, 0), None, best_columns),
        bests,
    )


@triton.jit
def write_tiles_gradient(
    tile_ptr, q_ptr, grad_tile_ptr, inside, classes, input_stride_c, target_stride_c, grad_stride_c, peak, slope,
    smooth, targets, smooth_share, o, scale, REPEAT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of BLOCK_K rows."""
    BLOCK_C: tl.constexpr = REPEAT * LANES
    tiles = (classes + (BLOCK_C - 1)) // BLOCK_C
    for visit in range(tiles):  # last tile first: it was read last, so it is in the cache if anything is
        columns = tile_columns((tiles - 1 - visit) * BLOCK_C, REPEAT, LANES)
        real = columns < classes
        mask = real & inside[None, None, :]
        offsets = columns.to(tl.int64) * input_stride_c
        x = tl.load(tile_ptr + offsets, mask=mask, other=-INF, eviction_policy="evict_first").to(tl.float32)
        u = shift_logits(x, 0, columns, real, o, scale, False)
        e = fast_exp(u - peak[None, None, :])
        q = e
        if o.soft:
            q_offsets = columns.to(tl.int64) * target_stride_c
            q = load_soft_weights(q_ptr, q_offsets, 0, columns, mask, smooth_share, o, False)
        du = ordinary_gradient(e, slope[None, None, :], smooth, q, 0, columns, real, o, False)
        if not o.soft:
            expanded = TargetValues(
                targets.column_a[None, None, :],
                targets.value_a[None, None, :],
                targets.column_b[None, None, :],
                targets.value_b[None, None, :],
            )
            du = place_targets(columns, du, expanded, o)
        dx = undo_scale(du, 0, columns, real, o, scale, False)
        offsets = columns.to(tl.int64) * grad_stride_c
        tl.store(
            grad_tile_ptr + offsets, dx.to(grad_tile_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
        )


@triton.jit(do_not_specialize=["ignore_index"])
def margin_cross_entropy_tiles_forward_kernel(
    input_ptr,  # [N, C, K]
    o,  # KernelOptions
    loss_ptr,  # [N, K]
    lse_ptr,  # [N, K]
    prediction_ptr,  # [N, K] int64
    rest_ptr,  # [2, N, K]
    grad_ptr,  # [N, C, K]
    rows,
    classes,
    positions,
    input_stride_n,
    input_stride_c,
    input_stride_k,
    target_stride_n,
    target_stride_c,
    target_stride_k,
    grad_stride_n,
    grad_stride_c,
    grad_stride_k,
    ignore_index,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the results of BLOCK_K rows, visited in tiles [REPEAT, LANES, BLOCK_K].

    REPEAT is inside one thread where positions are contiguous. Sums over tiles are kept per lane, so that the loop has
    no exchange between threads.
    """
    n, k, inside, row = block_rows(tl.program_id(0), positions, BLOCK_K)
    row_ptr = input_ptr + n * input_stride_n + tl.minimum(k, positions - 1) * input_stride_k
    tile_ptr = input_ptr + n * input_stride_n + k[None, None, :] * input_stride_k
    q_ptr = o.target_ptr
    scale = load_scale(o.scale, o.learned_scale_ptr)
    smooth_share = load_smooth_share(o, classes)
    if o.soft:
        q_ptr = o.target_ptr + n * target_stride_n + k[None, None, :] * target_stride_k
        factor = load_factor(o)
        a, b = factor, factor  # not used
    else:
        smooth_total = load_smooth_total(o, classes)
        a, b = load_slots(row_ptr, row, o, scale, classes, input_stride_c, ignore_index)

    found, bests = sum_tiles(
        tile_ptr, q_ptr, a, b, inside, classes, input_stride_c, target_stride_c, smooth_share, o, scale,
        prediction_ptr is not None, REPEAT, LANES, BLOCK_K,
    )  # fmt: skip
    peak, mass, weighted, visited = found.peak, found.mass, found.weighted, found.visited

    # Every thread of a column of lanes has its rows' sums. By way of memory they reach one thread per row, so that the
    # rows' arithmetic is done once (it is most of the work where classes are few). From the barrier on, each thread
    # reads only those logits whose gradient it writes: grad_ptr may be input_ptr.
    tl.store(rest_ptr + row, peak, mask=inside)
    tl.store(rest_ptr + rows + row, mass, mask=inside)
    if o.soft or o.smooth:
        tl.store(loss_ptr + row, weighted, mask=inside)
        tl.store(lse_ptr + row, visited, mask=inside)
    tl.debug_barrier()
    peak, mass = tl.load(rest_ptr + row), tl.load(rest_ptr + rows + row)
    if o.soft or o.smooth:
        weighted, visited = tl.load(loss_ptr + row), tl.load(lse_ptr + row)
        tl.debug_barrier()  # rows are replicated over warps: no result is stored before all have read the sums

    if o.soft:
        log_mass = tl.log(mass)
        loss, lse = factor * (visited * log_mass - weighted), peak + log_mass
    else:
        loss, lse = row_loss(peak, mass, weighted, a, b, smooth_total, smooth_share, o)
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    if prediction_ptr is not None:
        best = largest(bests, 0)
        best_columns = tl.where(same_number(bests, best[None, :]), found.column, NO_COLUMN)
        tl.store(prediction_ptr + row, tl.min(best_columns, 0).to(tl.int64), mask=inside)

    if grad_ptr is not None:
        grad_tile_ptr = grad_ptr + n * grad_stride_n + k[None, None, :] * grad_stride_k
        if o.soft:
            slope, smooth, targets = factor * visited / mass, factor, factor
        else:
            slopes = row_slopes(peak, mass, a, b, 1.0, 0.0, smooth_total, smooth_share, o)
            slope, smooth = slopes.slope, slopes.smooth[None, None, :]
            targets = target_gradient(a, b, slopes, o)
        write_tiles_gradient(
            tile_ptr, q_ptr, grad_tile_ptr, inside, classes, input_stride_c, target_stride_c, grad_stride_c, peak,
            slope, smooth, targets, smooth_share, o, scale, REPEAT, LANES,
        )  # fmt: skip


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(
    a: Arguments, with_prediction: bool, with_grad: bool, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results of ``op.py``. ``out``: where grad_input is written; it may be ``a.input`` itself."""
    n, classes, k = a.input.shape
    soft = a.options.soft
    loss, lse = (a.input.new_empty((n, k), dtype=torch.float32) for _ in range(2))
    rest = loss.new_empty((2, n, k))
    prediction = loss.new_empty((n, k) if with_prediction else (0,), dtype=torch.int64)
    grad = a.input.new_empty((0,))
    if with_grad:
        grad = torch.empty_like(a.input) if out is None else out
    if n * k == 0:
        return loss, lse, prediction, rest, grad
    x = readable(a.input)
    options = kernel_options(a.options)
    named = {"input": x, **({"target": options.target_ptr} if soft else {}), **({"grad": grad} if with_grad else {})}
    layout = layout_of(named)
    arguments = {
        "input_ptr": x,
        "o": options,
        "loss_ptr": loss,
        "lse_ptr": lse,
        "prediction_ptr": prediction if with_prediction else None,
        "rest_ptr": rest,
        "grad_ptr": grad if with_grad else None,
        "classes": classes,
        "positions": layout.positions,
        "ignore_index": a.options.ignore_index,
        **layout.strides_of("target", "grad"),
    }
    with torch.cuda.device_of(x):
        if layout.rows:
            _forward_rows(a, layout, arguments, n * k, in_place(x, out))
        else:
            tiles = table.tiles_launch(classes, layout.positions, layout.classes_contiguous, x.element_size())
            blocks = layout.samples * triton.cdiv(layout.positions, tiles.block_k)
            constants = tiles.constants
            if with_prediction and torch.version.hip is None:
                constants["maxnreg"] = 255  # else the compiler may spill to have more programs run together
            margin_cross_entropy_tiles_forward_kernel[(blocks,)](**arguments, rows=n * k, **constants)
    return loss, lse, prediction, rest, grad


def _forward_rows(a: Arguments, layout: Layout, arguments: dict[str, Any], rows: int, in_place: bool) -> None:
    """Launch the rows kernels of a forward pass."""
    o, soft, predict = a.options, a.options.soft, arguments["prediction_ptr"] is not None
    smooth, mixed = o.label_smoothing > 0, o.mixed_target is not None
    each = o.weight is not None or o.smooth_weight is not None
    hungry = [o.class_scale is not None, each and (smooth or soft), soft]
    number = sum([*hungry, predict, o.angular, mixed, smooth])
    launch = table.rows_launch(
        rows, a.input.shape[1], a.input.element_size(), layout.aligned,
        max(sum(hungry), int(predict or mixed or number > 1)), number, arguments["grad_ptr"] is not None, 1 + soft,
    )  # fmt: skip
    arguments |= {"partial_ptr": None, "partial_column_ptr": None, "soft_mass_ptr": None, "parts": launch.parts}
    if launch.body != "parts":
        margin_cross_entropy_rows_forward_kernel[(rows,)](
            **arguments, BODY=launch.body, PARTS=1, IN_PLACE=in_place, **launch.constants
        )
        return
    rest = arguments["rest_ptr"]
    arguments["partial_ptr"] = rest.new_empty((5 if predict else 4, rows, launch.parts))
    if predict:
        arguments["partial_column_ptr"] = rest.new_empty((rows, launch.parts), dtype=torch.int32)
    launch_with(
        margin_cross_entropy_rows_statistics_kernel, (rows, launch.parts), arguments, part_groups=launch.part_groups,
        **launch.constants,
    )  # fmt: skip
    grad, arguments["grad_ptr"] = arguments["grad_ptr"], None
    if soft:
        arguments["soft_mass_ptr"] = rest.new_empty((rows,))
    finish = {"BODY": "parts", "PARTS": triton.next_power_of_2(launch.parts), "LANES": 32, "REPEAT": 1}
    finish["IN_PLACE"] = False
    margin_cross_entropy_rows_forward_kernel[(rows,)](**arguments, **finish, GROUP=launch.group, num_warps=1)
    if grad is not None:
        upstream = {"grad_ptr": grad, "grad_loss_ptr": None, "grad_lse_ptr": None}
        arguments |= upstream | {"grad_loss_stride": 0, "grad_lse_stride": 0}
        launch_rows_backward(layout, arguments, rows, in_place)
