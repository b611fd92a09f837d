# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""The rows kernels: the classes of a row are contiguous; one program per row, or per row and part of its columns.

Groups. A row of 8142 bf16 logits starts on a 4-byte boundary, so 16-byte accesses must ignore where rows begin: the
body of a row is cut into aligned groups of GROUP columns (16 bytes), each read and written whole or not at all. What is
irregular -- the head before the first whole group, the tail after the last, the groups that hold a target -- is left
out of the body by one comparison per group, and done in a tile of 4 * GROUP *edge* columns. So the body needs no
comparison per column, no element of a neighbouring row is ever touched, and no target's column is part of a sum.

Tiles of a body are [REPEAT, LANES, GROUP] with LANES the threads of the program: each thread has REPEAT groups. What is
summed up from tile to tile is kept per lane, so that a loop over tiles has no exchange between threads and its loads
need not wait for one another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import (
    _INF,
    _NO_COLUMN,
    _REPEAT_AXIS,
    _at_targets,
    _best,
    _better,
    _class,
    _edge,
    _exp,
    _full_scale,
    _group_of,
    _groups,
    _joined,
    _largest,
    _loss,
    _ordinary,
    _reference,
    _repeated,
    _same,
    _shifted,
    _slopes,
    _slots,
    _soft_weights,
    _through,
    _unscaled,
    _weight_total,
    _weighted,
)

# --- a row's body ----------------------------------------------------------------------------------------------------


@triton.jit
def _tile(begin, end, group_a, group_b, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr):
    """A tile from group ``begin`` on: groups [REPEAT, LANES], which are in the body, and all offsets and their mask."""
    group = _repeated(begin, REPEAT, LANES)
    inside = (group < end) & (group != group_a) & (group != group_b)
    offsets = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    mask = tl.broadcast_to(inside[:, :, None], offsets.shape)
    return group, inside, offsets, mask


@triton.jit
def _lane_sum(x):
    return tl.sum(tl.sum(x, 2), _REPEAT_AXIS)


@triton.jit
def _grown(u, peaks, masses, weighteds, visiteds):
    """The lanes' maxima with one tile more, their sums relative to them, and the tile relative to them. Not yet in
    ``weighteds``: the tile's."""
    before = peaks
    peaks = tl.maximum(peaks, tl.max(tl.max(u, 2), _REPEAT_AXIS))
    masses, weighteds = _joined(before, masses, weighteds, visiteds, peaks)
    z = u - tl.expand_dims(_reference(peaks), _REPEAT_AXIS)[:, :, None]
    masses += _lane_sum(_exp(z))
    return peaks, masses, weighteds, z


@triton.jit
def _best_groups(x, group, inside):
    """Of each lane: its maximum (a NaN is larger than anything) and the first group that has it, [LANES]."""
    highest = _largest(x, 2)
    best = _largest(highest, _REPEAT_AXIS)
    has_it = inside & _same(highest, tl.expand_dims(best, _REPEAT_AXIS))
    return best, tl.min(tl.where(has_it, group, _NO_COLUMN), _REPEAT_AXIS)


@triton.jit
def _best_of_lanes(body_ptr, head, best, group, GROUP: tl.constexpr):
    """Maximum over the lanes and its first column, whose group is read again."""
    highest = _largest(best, 0)
    first = tl.min(tl.where(_same(best, highest), group, _NO_COLUMN), 0)
    exists = first < _NO_COLUMN
    offsets = tl.where(exists, first, 0) * GROUP + tl.arange(0, GROUP)
    x = tl.load(body_ptr + offsets, mask=exists & (offsets >= 0), other=-_INF).to(tl.float32)
    return highest, tl.min(tl.where(exists & _same(x, highest), head + offsets, _NO_COLUMN), 0)


@triton.jit
def _statistics(
    body_ptr,  # the row's first aligned logit
    q_body,  # the same of the probabilities where SOFT
    head,
    begin,
    end,
    group_a,
    group_b,
    weight_ptr,  # [C]
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    scale,
    label_smoothing,
    smooth_share,
    PREDICT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Over the body's groups ``begin`` to ``end``: maximum (-inf if there is none) and sum of exp(u - maximum); sums of
    w_j (u_j - maximum) and of w_j; largest logit and its column."""
    WIDE: tl.constexpr = GROUP >= 4
    peaks = tl.full([LANES], -_INF, tl.float32)
    masses = tl.zeros([LANES], tl.float32)
    weighteds = tl.zeros([LANES], tl.float32)
    visiteds = tl.zeros([LANES], tl.float32)
    bests = tl.full([LANES], -_INF, tl.float32)
    best_groups = tl.full([LANES], _NO_COLUMN, tl.int32)
    for first in range(begin, end, REPEAT * LANES):
        group, inside, offsets, mask = _tile(first, end, group_a, group_b, GROUP, LANES, REPEAT)
        x = tl.load(body_ptr + offsets, mask=mask, other=-_INF, eviction_policy="evict_last").to(tl.float32)
        u = _shifted(x, head, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, WIDE)
        peaks, masses, weighteds, z = _grown(u, peaks, masses, weighteds, visiteds)
        if SOFT:
            q = _soft_weights(
                q_body, offsets, head, offsets, mask, weight_ptr, label_smoothing, smooth_share, SMOOTH, WIDE
            )
            weighteds += _lane_sum(tl.where(mask, q * z, 0.0))
            visiteds += _lane_sum(q)
        elif SMOOTH:
            weighteds += _lane_sum(_weighted(z, head, offsets, mask, weight_ptr, WIDE))
            if weight_ptr is not None:
                ones = tl.full(x.shape, 1.0, tl.float32)
                visiteds += _lane_sum(_weighted(ones, head, offsets, mask, weight_ptr, WIDE))
            else:
                visiteds += tl.sum(inside.to(tl.float32), _REPEAT_AXIS) * GROUP
        if PREDICT:
            tile_best, tile_group = _best_groups(x, group, inside)
            bests, best_groups = _better(bests, best_groups, tile_best, tile_group)
    peak = tl.max(peaks, 0)
    masses, weighteds = _joined(peaks, masses, weighteds, visiteds, peak)
    best, column = peak, head  # not used
    if PREDICT:
        best, column = _best_of_lanes(body_ptr, head, bests, best_groups, GROUP)
    return peak, tl.sum(masses, 0), tl.sum(weighteds, 0), tl.sum(visiteds, 0), best, column


@triton.jit
def _merged(
    partial_ptr,  # [4 or 5, rows, parts]
    partial_column_ptr,  # [rows, parts] int32
    row,
    rows,
    parts,
    PREDICT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What ``_statistics`` returns, from the parts of a row."""
    part = tl.arange(0, PARTS)
    mask = part < parts
    offsets = row * parts + part
    size = tl.cast(rows, tl.int64) * parts
    peaks = tl.load(partial_ptr + offsets, mask=mask, other=-_INF)
    masses = tl.load(partial_ptr + size + offsets, mask=mask, other=0.0)
    weighteds = tl.zeros([PARTS], tl.float32)
    visiteds = tl.zeros([PARTS], tl.float32)
    if WEIGHTED:
        weighteds = tl.load(partial_ptr + 2 * size + offsets, mask=mask, other=0.0)
        visiteds = tl.load(partial_ptr + 3 * size + offsets, mask=mask, other=0.0)
    peak = tl.max(peaks, 0)
    masses, weighteds = _joined(peaks, masses, weighteds, visiteds, peak)
    best, column = peak, part  # not used
    if PREDICT:
        bests = tl.load(partial_ptr + 4 * size + offsets, mask=mask, other=-_INF)
        columns = tl.load(partial_column_ptr + offsets, mask=mask, other=_NO_COLUMN)
        best = _largest(bests, 0)
        column = tl.min(tl.where(_same(bests, best), columns, _NO_COLUMN), 0)
    return peak, tl.sum(masses, 0), tl.sum(weighteds, 0), tl.sum(visiteds, 0), best, column


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index", "part_groups"])
def _rows_statistics_kernel(
    input_ptr,  # [N, C, K], unit class stride
    target_ptr,  # [N, K] int64, or [N, C, K] probabilities with unit class stride where SOFT
    mixed_target_ptr,  # [N, K] int64
    weight_ptr,  # [C]
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    partial_ptr,  # [4 or 5, rows, parts]: what _statistics returns
    partial_column_ptr,  # [rows, parts] int32
    classes,
    positions,
    part_groups,
    input_stride_n,
    input_stride_k,
    target_stride_n,
    target_stride_k,
    scale,
    ignore_index,
    label_smoothing,
    HAS_SCALE: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Of one part of a row's body; ``_rows_forward_kernel`` merges the parts."""
    PREDICT: tl.constexpr = partial_column_ptr is not None
    rows, parts = tl.num_programs(0), tl.num_programs(1)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, k = row // positions, row % positions
    aligned, head, groups = _groups(n * input_stride_n + k * input_stride_k, classes, GROUP)
    q_body = target_ptr
    group_a, group_b = -1, -1
    if SOFT:
        q_aligned, _, _ = _groups(n * target_stride_n + k * target_stride_k, classes, GROUP)
        q_body = target_ptr + q_aligned
    else:
        _, _, column = _class(target_ptr + row, classes, ignore_index)
        group_a = _group_of(column, head, groups, GROUP)
        if mixed_target_ptr is not None:
            _, _, column = _class(mixed_target_ptr + row, classes, ignore_index)
            group_b = _group_of(column, head, groups, GROUP)
    begin = part * part_groups
    peak, mass, weighted, visited, best, best_column = _statistics(
        input_ptr + aligned, q_body, head, begin, tl.minimum(begin + part_groups, groups), group_a, group_b, weight_ptr,
        class_bias_ptr, class_scale_ptr, _full_scale(scale, learned_scale_ptr), label_smoothing,
        label_smoothing / classes, PREDICT, HAS_SCALE, SMOOTH, SOFT, GROUP, LANES, REPEAT,
    )  # fmt: skip
    out_ptr = partial_ptr + row * parts + part
    size = tl.cast(rows, tl.int64) * parts
    tl.store(out_ptr, peak)
    tl.store(out_ptr + size, mass)
    if SOFT or SMOOTH:
        tl.store(out_ptr + 2 * size, weighted)
        tl.store(out_ptr + 3 * size, visited)
    if PREDICT:
        tl.store(out_ptr + 4 * size, best)
        tl.store(partial_column_ptr + row * parts + part, best_column)


@triton.jit(do_not_specialize=["ignore_index", "parts"])
def _rows_forward_kernel(
    input_ptr,  # [N, C, K], unit class stride
    target_ptr,  # [N, K] int64, or [N, C, K] probabilities with unit class stride where SOFT
    mixed_target_ptr,  # [N, K] int64
    mix_lambda_ptr,  # 0-dim or [N, K]
    weight_ptr,  # [C]
    weight_total_ptr,  # 0-dim
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    learned_scale_ptr,  # 0-dim
    coefficient_ptr,  # [1 or 2]
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
    mix_lambda_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    label_smoothing,
    HAS_SCALE: tl.constexpr,
    ANGULAR: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    BODY: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    PARTS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """One program per row. BODY: one "tile" that stays in registers; a "loop" over tiles, twice where there is a
    gradient; or "parts", which _rows_statistics_kernel has been through. IN_PLACE: grad_ptr is input_ptr."""
    WIDE: tl.constexpr = GROUP >= 4
    MIXED: tl.constexpr = mixed_target_ptr is not None
    PREDICT: tl.constexpr = prediction_ptr is not None
    rows = tl.num_programs(0)
    row = tl.program_id(0).to(tl.int64)
    n, k = row // positions, row % positions
    offset = n * input_stride_n + k * input_stride_k
    aligned, head, groups = _groups(offset, classes, GROUP)
    q_row = target_ptr
    q_body = target_ptr
    scale = _full_scale(scale, learned_scale_ptr)
    smooth_share = label_smoothing / classes
    row_ptr = input_ptr + offset
    body_ptr = input_ptr + aligned
    group_a, group_b = -1, -1
    if SOFT:
        q_offset = n * target_stride_n + k * target_stride_k
        q_row = target_ptr + q_offset
        q_aligned, _, _ = _groups(q_offset, classes, GROUP)
        q_body = target_ptr + q_aligned
        factor = tl.full([], 1.0, tl.float32)
        if coefficient_ptr is not None:
            factor = tl.load(coefficient_ptr)
    else:
        weight_total = _weight_total(weight_total_ptr, classes)
        a, b = _slots(
            row_ptr, row, target_ptr, mixed_target_ptr, mix_lambda_ptr, coefficient_ptr, weight_ptr, class_bias_ptr,
            class_scale_ptr, margin_ptr, classes, 1, mix_lambda_stride, scale, margin, cos_margin, sin_margin,
            ignore_index, ANGULAR,
        )  # fmt: skip
        column_a, _, _, _, _, _, _, _, _ = a
        column_b, _, _, _, _, _, _, _, _ = b
        group_a = _group_of(column_a, head, groups, GROUP)
        if MIXED:
            group_b = _group_of(column_b, head, groups, GROUP)
            group_b = tl.where(group_b == group_a, -1, group_b)

    edge, edge_mask = _edge(head, groups, group_a, group_b, classes, GROUP)
    x_edge = tl.load(row_ptr + edge, mask=edge_mask, other=-_INF).to(tl.float32)
    u_edge = _shifted(x_edge, 0, edge, edge_mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
    rest_mask = edge_mask
    if not SOFT:
        rest_mask = rest_mask & (edge != column_a)
        if MIXED:
            rest_mask = rest_mask & (edge != column_b)
    peak = tl.max(tl.where(rest_mask, u_edge, -_INF), 0)

    if BODY == "tile":
        group, inside, offsets, mask = _tile(0, groups, group_a, group_b, GROUP, LANES, REPEAT)
        x = tl.load(body_ptr + offsets, mask=mask, other=-_INF).to(tl.float32)
        u = _shifted(x, head, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, WIDE)
        peak = _reference(tl.maximum(peak, tl.max(tl.max(tl.max(u, 2), 0), 0)))
        e = _exp(u - peak)
        mass = tl.sum(_lane_sum(e), 0)
        weighted = 0.0
        visited = 0.0
        if SOFT:
            q = _soft_weights(
                q_body, offsets, head, offsets, mask, weight_ptr, label_smoothing, smooth_share, SMOOTH, WIDE
            )
            visited = tl.sum(_lane_sum(q), 0)
            weighted = tl.sum(_lane_sum(tl.where(mask, q * (u - peak), 0.0)), 0)
        elif SMOOTH:
            weighted = tl.sum(_lane_sum(_weighted(u - peak, head, offsets, mask, weight_ptr, WIDE)), 0)
        if PREDICT:
            bests, best_groups = _best_groups(x, group, inside)
            best, prediction = _best_of_lanes(body_ptr, head, bests, best_groups, GROUP)
    else:
        if BODY == "loop":
            body_peak, mass, weighted, visited, best, prediction = _statistics(
                body_ptr, q_body, head, 0, groups, group_a, group_b, weight_ptr, class_bias_ptr,
                class_scale_ptr, scale, label_smoothing, smooth_share, PREDICT, HAS_SCALE, SMOOTH, SOFT, GROUP, LANES,
                REPEAT,
            )  # fmt: skip
        else:
            body_peak, mass, weighted, visited, best, prediction = _merged(
                partial_ptr, partial_column_ptr, row, rows, parts, PREDICT, SOFT or SMOOTH, PARTS
            )
        peak = tl.maximum(peak, body_peak)
        mass, weighted = _joined(body_peak, mass, weighted, visited, peak)
        peak = _reference(peak)
    if PREDICT:
        edge_best, edge_column = _best(x_edge, edge, edge_mask)
        _, prediction = _better(edge_best, edge_column, best, prediction)
        tl.store(prediction_ptr + row, prediction.to(tl.int64))

    e_edge = _exp(tl.where(rest_mask, u_edge, -_INF) - peak)
    mass += tl.sum(e_edge, 0)
    if SOFT:
        q_edge = _soft_weights(
            q_row, edge, 0, edge, edge_mask, weight_ptr, label_smoothing, smooth_share, SMOOTH, False
        )
        visited += tl.sum(q_edge, 0)
        weighted += tl.sum(tl.where(edge_mask, q_edge * (u_edge - peak), 0.0), 0)
        log_mass = tl.log(mass)
        loss, lse = factor * (visited * log_mass - weighted), peak + log_mass
        if soft_mass_ptr is not None:
            tl.store(soft_mass_ptr + row, visited)
    else:
        if SMOOTH:
            weighted += tl.sum(_weighted(u_edge - peak, 0, edge, rest_mask, weight_ptr, False), 0)
        loss, lse = _loss(peak, mass, weighted, a, b, weight_total, label_smoothing, smooth_share, MIXED, SMOOTH)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(rest_ptr + row, peak)
    tl.store(rest_ptr + rows + row, mass)

    if grad_ptr is not None:
        if IN_PLACE:  # from here on, each thread reads only what it will write itself
            tl.debug_barrier()
        grad_offset = n * grad_stride_n + k * grad_stride_k
        grad_aligned, _, _ = _groups(grad_offset, classes, GROUP)
        if SOFT:
            slope, smooth = factor * visited / mass, factor
        else:
            slope, smooth, plain_a, dv_a, plain_b, dv_b = _slopes(
                peak, mass, a, b, 1.0, 0.0, weight_total, label_smoothing, smooth_share, MIXED
            )
            q_edge = e_edge
        du = _ordinary(e_edge, slope, smooth, q_edge, 0, edge, edge_mask, weight_ptr, SMOOTH, SOFT, False)
        if not SOFT:
            column_a, through_a, column_b, through_b = _through(a, b, plain_a, dv_a, plain_b, dv_b, MIXED)
            du = _at_targets(edge, du, column_a, through_a, column_b, through_b, MIXED)
        dx = _unscaled(du, 0, edge, edge_mask, class_scale_ptr, scale, HAS_SCALE, False)
        tl.store(grad_ptr + grad_offset + edge, dx.to(grad_ptr.dtype.element_ty), mask=edge_mask)
        if BODY == "tile":
            if not SOFT:
                q = e
            du = _ordinary(e, slope, smooth, q, head, offsets, mask, weight_ptr, SMOOTH, SOFT, WIDE)
            dx = _unscaled(du, head, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)
            tl.store(grad_ptr + grad_aligned + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
        else:  # last tile first: it was read last, so it is in the cache if anything is
            tiles = (groups + (REPEAT * LANES - 1)) // (REPEAT * LANES)
            for visit in range(tiles):
                begin = (tiles - 1 - visit) * (REPEAT * LANES)
                group, inside, offsets, mask = _tile(begin, groups, group_a, group_b, GROUP, LANES, REPEAT)
                x = tl.load(body_ptr + offsets, mask=mask, other=-_INF, eviction_policy="evict_first").to(tl.float32)
                u = _shifted(x, head, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, WIDE)
                e = _exp(u - peak)
                q = e
                if SOFT:
                    q = _soft_weights(
                        q_body, offsets, head, offsets, mask, weight_ptr, label_smoothing, smooth_share, SMOOTH, WIDE
                    )
                tile_du = _ordinary(e, slope, smooth, q, head, offsets, mask, weight_ptr, SMOOTH, SOFT, WIDE)
                tile_dx = _unscaled(tile_du, head, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)
                tl.store(
                    grad_ptr + grad_aligned + offsets, tile_dx.to(grad_ptr.dtype.element_ty), mask=mask,
                    eviction_policy="evict_first",
                )  # fmt: skip


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def _own_logits_kernel(
    input_ptr,  # [N, C, K], unit class stride
    target_ptr,  # [N, K] int64
    mixed_target_ptr,  # [N, K] int64
    own_ptr,  # [1 or 2, N, K] float32
    rows,
    classes,
    positions,
    input_stride_n,
    input_stride_k,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """The logits of the targets' columns (of column 0 where there is none), one row per lane."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    row_ptr = input_ptr + row // positions * input_stride_n + row % positions * input_stride_k
    index, _, _ = _class(target_ptr + row, classes, ignore_index)
    tl.store(own_ptr + row, tl.load(row_ptr + index).to(tl.float32), mask=inside)
    if mixed_target_ptr is not None:
        index, _, _ = _class(mixed_target_ptr + row, classes, ignore_index)
        tl.store(own_ptr + rows + row, tl.load(row_ptr + index).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["ignore_index"])
def _rows_backward_kernel(
    input_ptr,  # [N, C, K], unit class stride
    target_ptr,  # [N, K] int64, or [N, C, K] probabilities with unit class stride where SOFT
    mixed_target_ptr,  # [N, K] int64
    mix_lambda_ptr,  # 0-dim or [N, K]
    weight_ptr,  # [C]
    weight_total_ptr,  # 0-dim
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    learned_scale_ptr,  # 0-dim
    coefficient_ptr,  # [1 or 2]
    rest_ptr,  # [2, N, K]
    soft_mass_ptr,  # [N, K] where SOFT: sum of the soft weights
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
    mix_lambda_stride,
    grad_loss_stride,
    grad_lse_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    label_smoothing,
    HAS_SCALE: tl.constexpr,
    ANGULAR: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """The input's gradient, one program per row and tile of its body; that of tile 0 also does the edge. Last things
    first: in the order against that of the pass before, the cache still holds what comes first."""
    WIDE: tl.constexpr = GROUP >= 4
    MIXED: tl.constexpr = mixed_target_ptr is not None
    rows = tl.num_programs(0)
    row = (rows - 1 - tl.program_id(0)).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    n, k = row // positions, row % positions
    offset = n * input_stride_n + k * input_stride_k
    grad_offset = n * grad_stride_n + k * grad_stride_k
    aligned, head, groups = _groups(offset, classes, GROUP)
    grad_aligned, _, _ = _groups(grad_offset, classes, GROUP)
    scale = _full_scale(scale, learned_scale_ptr)
    smooth_share = label_smoothing / classes
    row_ptr = input_ptr + offset
    peak = tl.load(rest_ptr + row)
    mass = tl.load(rest_ptr + rows + row)
    upstream = tl.full([], 1.0, tl.float32)
    if grad_loss_ptr is not None:
        upstream = tl.load(grad_loss_ptr + row * grad_loss_stride)
    upstream_lse = 0.0
    if grad_lse_ptr is not None:
        upstream_lse = tl.load(grad_lse_ptr + row * grad_lse_stride)
    group_a, group_b = -1, -1
    if SOFT:
        q_offset = n * target_stride_n + k * target_stride_k
        q_aligned, _, _ = _groups(q_offset, classes, GROUP)
        smooth = upstream
        if coefficient_ptr is not None:
            smooth = upstream * tl.load(coefficient_ptr)
        slope = (smooth * tl.load(soft_mass_ptr + row) + upstream_lse) / mass
    else:
        weight_total = _weight_total(weight_total_ptr, classes)
        CLASS_STRIDE: tl.constexpr = 1 if own_ptr is None else 0
        row_ptr_a, row_ptr_b = row_ptr, row_ptr
        if own_ptr is not None:  # another program of this row, or another warp, may be done with the targets' columns
            row_ptr_a, row_ptr_b = own_ptr + row, own_ptr + rows + row
        a, b = _slots(
            row_ptr_a, row, target_ptr, mixed_target_ptr, mix_lambda_ptr, coefficient_ptr, weight_ptr, class_bias_ptr,
            class_scale_ptr, margin_ptr, classes, CLASS_STRIDE, mix_lambda_stride, scale, margin, cos_margin,
            sin_margin, ignore_index, ANGULAR, row_ptr_b,
        )  # fmt: skip
        column_a, _, _, _, _, _, _, _, _ = a
        column_b, _, _, _, _, _, _, _, _ = b
        group_a = _group_of(column_a, head, groups, GROUP)
        if MIXED:
            group_b = _group_of(column_b, head, groups, GROUP)
            group_b = tl.where(group_b == group_a, -1, group_b)
        slope, smooth, plain_a, dv_a, plain_b, dv_b = _slopes(
            peak, mass, a, b, upstream, upstream_lse, weight_total, label_smoothing, smooth_share, MIXED
        )

    if tile == 0:
        edge, edge_mask = _edge(head, groups, group_a, group_b, classes, GROUP)
        x = tl.load(row_ptr + edge, mask=edge_mask, other=-_INF).to(tl.float32)
        u = _shifted(x, 0, edge, edge_mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
        e = _exp(u - peak)
        q = e
        if SOFT:
            q = _soft_weights(
                target_ptr + q_offset, edge, 0, edge, edge_mask, weight_ptr, label_smoothing, smooth_share, SMOOTH,
                False,
            )  # fmt: skip
        du = _ordinary(e, slope, smooth, q, 0, edge, edge_mask, weight_ptr, SMOOTH, SOFT, False)
        if not SOFT:
            column_a, through_a, column_b, through_b = _through(a, b, plain_a, dv_a, plain_b, dv_b, MIXED)
            du = _at_targets(edge, du, column_a, through_a, column_b, through_b, MIXED)
        dx = _unscaled(du, 0, edge, edge_mask, class_scale_ptr, scale, HAS_SCALE, False)
        tl.store(grad_ptr + grad_offset + edge, dx.to(grad_ptr.dtype.element_ty), mask=edge_mask)

    _, _, offsets, mask = _tile(tile * (REPEAT * LANES), groups, group_a, group_b, GROUP, LANES, REPEAT)
    x = tl.load(input_ptr + aligned + offsets, mask=mask, other=-_INF).to(tl.float32)
    u = _shifted(x, head, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, WIDE)
    e = _exp(u - peak)
    q = e
    if SOFT:
        q = _soft_weights(
            target_ptr + q_aligned, offsets, head, offsets, mask, weight_ptr, label_smoothing, smooth_share, SMOOTH,
            WIDE,
        )  # fmt: skip
    du = _ordinary(e, slope, smooth, q, head, offsets, mask, weight_ptr, SMOOTH, SOFT, WIDE)
    dx = _unscaled(du, head, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)
    tl.store(grad_ptr + grad_aligned + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
