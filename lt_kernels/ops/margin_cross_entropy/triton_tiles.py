# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""The tiles kernels: any layout (segmentation, transposed logits), and rows of few classes.

One program per BLOCK_K rows, visited in [BLOCK_C, BLOCK_K] tiles; backward, one per BLOCK_C columns and many rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import (
    _INF,
    _NO_COLUMN,
    _REPEAT_AXIS,
    _affine,
    _at_targets,
    _better,
    _exp,
    _full_scale,
    _joined,
    _largest,
    _loss,
    _ordinary,
    _positions,
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


@triton.jit
def _columns(begin, REPEAT: tl.constexpr, LANES: tl.constexpr):
    return _repeated(begin, REPEAT, LANES)[:, :, None]


# --- tiles: forward --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index"])
def _tiles_forward_kernel(
    input_ptr,  # [N, C, K]
    target_ptr,  # [N, K] int64, or [N, C, K] probabilities where SOFT
    mixed_target_ptr,  # [N, K] int64
    mix_lambda_ptr,  # 0-dim or [N, K]
    weight_ptr,  # [C]
    weight_total_ptr,  # 0-dim
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    learned_scale_ptr,  # 0-dim
    coefficient_ptr,  # [1 or 2]
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
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles are [REPEAT, LANES, BLOCK_K], with REPEAT inside one thread where positions are contiguous: what is summed
    up from tile to tile is kept per lane, so that the loop has no exchange between threads."""
    BLOCK_C: tl.constexpr = REPEAT * LANES
    MIXED: tl.constexpr = mixed_target_ptr is not None
    n, k, inside, row = _positions(tl.program_id(0), positions, BLOCK_K)
    row_ptr = input_ptr + n * input_stride_n + tl.minimum(k, positions - 1) * input_stride_k
    tile_ptr = input_ptr + n * input_stride_n + k[None, None, :] * input_stride_k
    q_ptr = target_ptr
    scale = _full_scale(scale, learned_scale_ptr)
    smooth_share = label_smoothing / classes
    if SOFT:
        q_ptr = target_ptr + n * target_stride_n + k[None, None, :] * target_stride_k
        factor = tl.full([], 1.0, tl.float32)
        if coefficient_ptr is not None:
            factor = tl.load(coefficient_ptr)
    else:
        weight_total = _weight_total(weight_total_ptr, classes)
        a, b = _slots(
            row_ptr, row, target_ptr, mixed_target_ptr, mix_lambda_ptr, coefficient_ptr, weight_ptr, class_bias_ptr,
            class_scale_ptr, margin_ptr, classes, input_stride_c, mix_lambda_stride, scale, margin, cos_margin,
            sin_margin, ignore_index, ANGULAR,
        )  # fmt: skip
        column_a, _, _, _, _, _, _, _, _ = a
        column_b, _, _, _, _, _, _, _, _ = b

    peaks = tl.full([LANES, BLOCK_K], -_INF, tl.float32)
    masses = tl.zeros([LANES, BLOCK_K], tl.float32)
    weighteds = tl.zeros([LANES, BLOCK_K], tl.float32)
    visiteds = tl.zeros([LANES, BLOCK_K], tl.float32)
    bests = tl.full([LANES, BLOCK_K], -_INF, tl.float32)
    best_columns = tl.full([LANES, BLOCK_K], _NO_COLUMN, tl.int32)
    for begin in range(0, classes, BLOCK_C):
        columns = _columns(begin, REPEAT, LANES)
        real = columns < classes
        mask = real & inside[None, None, :]
        offsets = columns.to(tl.int64) * input_stride_c
        x = tl.load(tile_ptr + offsets, mask=mask, other=-_INF, eviction_policy="evict_last").to(tl.float32)
        u = _shifted(x, 0, columns, real, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
        counted = mask
        if not SOFT:
            counted = counted & (columns != column_a[None, None, :])
            if MIXED:
                counted = counted & (columns != column_b[None, None, :])
            u = tl.where(counted, u, -_INF)
        before = peaks
        peaks = tl.maximum(peaks, tl.max(u, _REPEAT_AXIS))
        masses, weighteds = _joined(before, masses, weighteds, visiteds, peaks)
        z = u - tl.expand_dims(_reference(peaks), _REPEAT_AXIS)
        masses += tl.sum(_exp(z), _REPEAT_AXIS)
        if SOFT:
            q = _soft_weights(
                q_ptr, columns.to(tl.int64) * target_stride_c, 0, columns, mask, weight_ptr, label_smoothing,
                smooth_share, SMOOTH, False,
            )  # fmt: skip
            weighteds += tl.sum(tl.where(mask, q * z, 0.0), _REPEAT_AXIS)
            visiteds += tl.sum(q, _REPEAT_AXIS)
        elif SMOOTH:
            weighteds += tl.sum(_weighted(z, 0, columns, counted, weight_ptr, False), _REPEAT_AXIS)
            ones = tl.full(x.shape, 1.0, tl.float32)
            visiteds += tl.sum(_weighted(ones, 0, columns, counted, weight_ptr, False), _REPEAT_AXIS)
        if prediction_ptr is not None:
            tile_bests = _largest(x, _REPEAT_AXIS)  # what is masked is -inf, and no earlier column
            has_it = _same(x, tl.expand_dims(tile_bests, _REPEAT_AXIS))
            tile_columns = tl.min(tl.where(has_it, columns, _NO_COLUMN), _REPEAT_AXIS)
            bests, best_columns = _better(bests, best_columns, tile_bests, tile_columns)
    peak = tl.max(peaks, 0)
    masses, weighteds = _joined(peaks, masses, weighteds, visiteds, peak[None, :])
    peak = _reference(peak)
    mass, weighted, visited = tl.sum(masses, 0), tl.sum(weighteds, 0), tl.sum(visiteds, 0)

    # Every thread of a column of lanes has its rows' sums. By way of memory they reach one thread per row, so that the
    # rows' arithmetic is done once (it is most of the work where classes are few). From the barrier on, each thread
    # reads only those logits whose gradient it writes: grad_ptr may be input_ptr.
    tl.store(rest_ptr + row, peak, mask=inside)
    tl.store(rest_ptr + rows + row, mass, mask=inside)
    if SOFT or SMOOTH:
        tl.store(loss_ptr + row, weighted, mask=inside)
        tl.store(lse_ptr + row, visited, mask=inside)
    tl.debug_barrier()
    peak, mass = tl.load(rest_ptr + row), tl.load(rest_ptr + rows + row)
    if SOFT or SMOOTH:
        weighted, visited = tl.load(loss_ptr + row), tl.load(lse_ptr + row)

    if SOFT:
        log_mass = tl.log(mass)
        loss, lse = factor * (visited * log_mass - weighted), peak + log_mass
    else:
        loss, lse = _loss(peak, mass, weighted, a, b, weight_total, label_smoothing, smooth_share, MIXED, SMOOTH)
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    if prediction_ptr is not None:
        best = _largest(bests, 0)
        best_columns = tl.where(_same(bests, best[None, :]), best_columns, _NO_COLUMN)
        tl.store(prediction_ptr + row, tl.min(best_columns, 0).to(tl.int64), mask=inside)

    if grad_ptr is not None:
        grad_tile_ptr = grad_ptr + n * grad_stride_n + k[None, None, :] * grad_stride_k
        if SOFT:
            slope, smooth = factor * visited / mass, factor
        else:
            slope, smooth, plain_a, dv_a, plain_b, dv_b = _slopes(
                peak, mass, a, b, 1.0, 0.0, weight_total, label_smoothing, smooth_share, MIXED
            )
            smooth = smooth[None, None, :]
            column_a, through_a, column_b, through_b = _through(a, b, plain_a, dv_a, plain_b, dv_b, MIXED)
        tiles = (classes + (BLOCK_C - 1)) // BLOCK_C
        for visit in range(tiles):  # last tile first: it was read last, so it is in the cache if anything is
            columns = _columns((tiles - 1 - visit) * BLOCK_C, REPEAT, LANES)
            real = columns < classes
            mask = real & inside[None, None, :]
            offsets = columns.to(tl.int64) * input_stride_c
            x = tl.load(tile_ptr + offsets, mask=mask, other=-_INF, eviction_policy="evict_first").to(tl.float32)
            u = _shifted(x, 0, columns, real, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
            e = _exp(u - peak[None, None, :])
            q = e
            if SOFT:
                q = _soft_weights(
                    q_ptr, columns.to(tl.int64) * target_stride_c, 0, columns, mask, weight_ptr, label_smoothing,
                    smooth_share, SMOOTH, False,
                )  # fmt: skip
            du = _ordinary(e, slope[None, None, :], smooth, q, 0, columns, real, weight_ptr, SMOOTH, SOFT, False)
            if not SOFT:
                du = _at_targets(
                    columns, du, column_a[None, None, :], through_a[None, None, :], column_b[None, None, :],
                    through_b[None, None, :], MIXED,
                )  # fmt: skip
            dx = _unscaled(du, 0, columns, real, class_scale_ptr, scale, HAS_SCALE, False)
            offsets = columns.to(tl.int64) * grad_stride_c
            tl.store(
                grad_tile_ptr + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
            )


# --- tiles: backward -------------------------------------------------------------------------------------------------


@triton.jit
def _soft_mass_kernel(
    target_ptr,  # [N, C, K] probabilities
    weight_ptr,  # [C]
    soft_mass_ptr,  # [N, K]
    classes,
    positions,
    target_stride_n,
    target_stride_c,
    target_stride_k,
    label_smoothing,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over the classes of w_j ((1 - smoothing) q_j + smoothing / C). ALIGN: see _tiles_backward_kernel."""
    n, k, inside, row = _positions(tl.program_id(0), positions, BLOCK_K)
    q_ptr = target_ptr + n * target_stride_n * ALIGN + k[None, :] * target_stride_k * ALIGN
    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for begin in range(0, classes, BLOCK_C):
        columns = begin + tl.arange(0, BLOCK_C)[:, None]
        mask = (columns < classes // ALIGN * ALIGN) & inside[None, :]
        total += _soft_weights(
            q_ptr, columns.to(tl.int64) * target_stride_c, 0, columns, mask, weight_ptr, label_smoothing,
            label_smoothing / classes, SMOOTH, False,
        )  # fmt: skip
    tl.store(soft_mass_ptr + row, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def _terms_kernel(
    input_ptr,  # [N, C, K]
    target_ptr,  # [N, K] int64; not read where SOFT
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
    BLOCK: tl.constexpr,
):
    """What the gradients of a row are made of, one row per lane."""
    MIXED: tl.constexpr = mixed_target_ptr is not None
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    scale = _full_scale(scale, learned_scale_ptr)
    peak = tl.load(rest_ptr + row)
    mass = tl.load(rest_ptr + rows + row)
    upstream = tl.load(grad_loss_ptr + row * grad_loss_stride)
    upstream_lse = tl.zeros([BLOCK], tl.float32)
    if grad_lse_ptr is not None:
        upstream_lse += tl.load(grad_lse_ptr + row * grad_lse_stride)
    size = tl.cast(rows, tl.int64)
    out_ptr = terms_ptr + row
    if SOFT:
        if coefficient_ptr is not None:
            upstream = upstream * tl.load(coefficient_ptr)
        slope = (upstream * tl.load(soft_mass_ptr + row) + upstream_lse) / mass
        tl.store(out_ptr, slope, mask=inside)
        tl.store(out_ptr + size, upstream + tl.zeros_like(slope), mask=inside)
    else:
        row_ptr = input_ptr + row // positions * input_stride_n + row % positions * input_stride_k
        a, b = _slots(
            row_ptr, row, target_ptr, mixed_target_ptr, mix_lambda_ptr, coefficient_ptr, weight_ptr, class_bias_ptr,
            class_scale_ptr, margin_ptr, classes, input_stride_c, mix_lambda_stride, scale, margin, cos_margin,
            sin_margin, ignore_index, ANGULAR,
        )  # fmt: skip
        slope, smooth, plain_a, dv_a, plain_b, dv_b = _slopes(
            peak, mass, a, b, upstream, upstream_lse, _weight_total(weight_total_ptr, classes), label_smoothing,
            label_smoothing / classes, MIXED,
        )  # fmt: skip
        tl.store(out_ptr, slope, mask=inside)
        tl.store(out_ptr + size, smooth, mask=inside)
        values_a = _target_values(row_ptr, a, plain_a, dv_a, class_scale_ptr, input_stride_c)
        if MIXED:
            values_b = _target_values(row_ptr, b, plain_b, dv_b, class_scale_ptr, input_stride_c)
            column_a, _, _, _, _, _, _, _, _ = a
            column_b, _, _, _, _, _, _, _, _ = b
            both = column_a == column_b  # one column for both targets
            _store_values(
                out_ptr + 6 * size, columns_ptr + size + row, size, column_b, values_b, values_a, both, inside
            )
            _store_values(out_ptr + 2 * size, columns_ptr + row, size, column_a, values_a, values_b, both, inside)
        else:
            column_a, _, _, _, _, _, _, _, _ = a
            _store_values(out_ptr + 2 * size, columns_ptr + row, size, column_a, values_a, values_a, False, inside)


@triton.jit
def _target_values(row_ptr, slot, plain, dv, class_scale_ptr, class_stride):
    """Of a target's column: d/d(class_scale_y x_y) and d/d(margin_y) over the scale, d/d(class_bias_y), d/d(scale)."""
    column, _, _, _, _, _, phi, dphi_dc, dphi_dm = slot
    index = tl.maximum(column, 0).to(tl.int64)
    cosine = tl.load(row_ptr + index * class_stride).to(tl.float32)
    if class_scale_ptr is not None:
        cosine = cosine * tl.load(class_scale_ptr + index)
    return plain + dv * dphi_dc, plain + dv, dv * dphi_dm, plain * cosine + dv * phi


@triton.jit
def _store_values(out_ptr, column_ptr, size, column, values, others, both, inside):
    tl.store(column_ptr, column, mask=inside)
    for kind in tl.static_range(4):
        tl.store(out_ptr + kind * size, tl.where(both, values[kind] + others[kind], values[kind]), mask=inside)


@triton.jit
def _at_columns(values, columns, column_a, column_b, terms_ptr, size, MIXED: tl.constexpr):
    """values, but one kind of the targets' in their columns."""
    if MIXED:
        values = tl.where(columns == column_b, tl.load(terms_ptr + 4 * size)[None, :], values)
    return tl.where(columns == column_a, tl.load(terms_ptr)[None, :], values)


@triton.jit(do_not_specialize=["rows", "blocks", "blocks_per_program"])
def _tiles_backward_kernel(
    input_ptr,  # [N, C, K]
    target_ptr,  # [N, C, K] probabilities; not read unless SOFT
    weight_ptr,  # [C]
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    rest_ptr,  # [2, N, K]
    terms_ptr,  # [10, N, K], see _terms_kernel
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
    scale,
    label_smoothing,
    HAS_SCALE: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    MIXED: tl.constexpr,
    ALIGN: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_MARGIN: tl.constexpr,
    NEED_LEARNED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All gradients; one program per BLOCK_C columns and ``blocks_per_program`` blocks of BLOCK_K rows, in order.

    The strides of samples and rows are in units of ALIGN elements, of which the classes are a multiple too: so that the
    compiler knows. IN_PLACE: grad_ptr is input_ptr."""
    NEEDED: tl.constexpr = NEED_BIAS + NEED_SCALE + NEED_MARGIN + NEED_LEARNED
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    real = columns < classes // ALIGN * ALIGN
    scale = _full_scale(scale, learned_scale_ptr)
    size = tl.cast(rows, tl.int64)
    slope_x = scale  # du/dx
    if class_scale_ptr is not None:
        class_scale = tl.load(class_scale_ptr + columns, mask=real, other=1.0)
        slope_x = scale * class_scale
    class_bias = None
    if class_bias_ptr is not None:
        class_bias = tl.load(class_bias_ptr + columns, mask=real, other=0.0)
    weight = 1.0
    if weight_ptr is not None and (SMOOTH or SOFT):
        weight = tl.load(weight_ptr + columns, mask=real, other=0.0)
    sum_bias = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)  # rows are added up at the end: no exchange in the loop
    sum_scale = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    sum_margin = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    sum_learned = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    first_block = tl.program_id(0) * blocks_per_program
    for block in range(first_block, tl.minimum(first_block + blocks_per_program, blocks)):
        n, k, inside, row = _positions(block, positions, BLOCK_K)
        mask = real & inside[None, :]
        offsets = k[None, :] * input_stride_k * ALIGN + columns.to(tl.int64) * input_stride_c
        x = tl.load(input_ptr + n * input_stride_n * ALIGN + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE or class_scale_ptr is not None:
            u = _affine(x, slope_x, class_bias)
        else:
            u = x if class_bias is None else x + class_bias
        u = u - tl.load(rest_ptr + row)[None, :]
        du = tl.load(terms_ptr + row)[None, :] * _exp(u)
        smooth = tl.load(terms_ptr + size + row)[None, :]
        if SOFT:
            offsets = k[None, :] * target_stride_k * ALIGN + columns.to(tl.int64) * target_stride_c
            q = tl.load(target_ptr + n * target_stride_n * ALIGN + offsets, mask=mask, other=0.0).to(tl.float32)
            if SMOOTH:
                q = (1.0 - label_smoothing) * q + label_smoothing / classes
            du -= smooth * (weight * q)
            if grad_target_ptr is not None:
                log_mass = tl.log(tl.load(rest_ptr + size + row))[None, :]
                dq = smooth * (label_smoothing - 1.0) * (u - log_mass) * weight
                offsets = k[None, :] * grad_target_stride_k * ALIGN + columns.to(tl.int64) * grad_target_stride_c
                offsets += n * grad_target_stride_n * ALIGN
                tl.store(grad_target_ptr + offsets, dq.to(grad_target_ptr.dtype.element_ty), mask=mask)
        elif SMOOTH:
            du -= smooth * weight
        through = du
        own_ptr = terms_ptr + 2 * size + row
        if not SOFT:
            column_a = tl.load(columns_ptr + row)[None, :]
            column_b = column_a
            if MIXED:
                column_b = tl.load(columns_ptr + size + row)[None, :]
            through = _at_columns(du, columns, column_a, column_b, own_ptr, size, MIXED)
        if grad_ptr is not None:
            dx = through
            if HAS_SCALE or class_scale_ptr is not None:
                dx = dx * slope_x
            offsets = k[None, :] * grad_stride_k * ALIGN + columns.to(tl.int64) * grad_stride_c
            if IN_PLACE and NEEDED > 0:  # of a small tile several threads have read the same logit for their sums
                tl.debug_barrier()
            tl.store(grad_ptr + n * grad_stride_n * ALIGN + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
        if NEED_BIAS:
            values = du
            if not SOFT:
                values = _at_columns(du, columns, column_a, column_b, own_ptr + size, size, MIXED)
            sum_bias += tl.where(mask, values, 0.0)
        if NEED_SCALE:
            sum_scale += tl.where(mask, through * x, 0.0)
        if NEED_MARGIN:
            values = _at_columns(tl.zeros_like(x), columns, column_a, column_b, own_ptr + 2 * size, size, MIXED)
            sum_margin += tl.where(mask, values, 0.0)
        if NEED_LEARNED:
            values = du * x
            if class_scale_ptr is not None:
                values = values * class_scale
            if not SOFT:
                values = _at_columns(values, columns, column_a, column_b, own_ptr + 3 * size, size, MIXED)
            sum_learned += tl.where(mask, values, 0.0)
    if NEEDED > 0:
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
