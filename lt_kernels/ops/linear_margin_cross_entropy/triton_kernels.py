# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Kernels of the tiled strategy: logits are computed tile by tile from input [N, D] and factor [C, D], never stored.

With s_ij = <input_i, factor_j> from the dot's float32 accumulator, the logits and the shifted logits are

    x_ij = inverse_norm_j s_ij + linear_bias_j
    u_ij = slope_j s_ij + offset_j        slope_j  = scale * class_scale_j * inverse_norm_j
                                          offset_j = scale * class_scale_j * linear_bias_j + class_bias_j

so a tile costs one multiply-add per logit whatever the class vectors are. The targets' own logits are computed apart,
row by row. Forward: each program visits the class tiles of one split for one block of rows; a second kernel merges the
splits in order. Backward: one program per block of rows (and split of the classes) for the gradient of the input, one
per block of classes (and split of the rows) for those of the factor and the class vectors.

FLOP per logit: 2 D forward, 4 D for each of the two backward kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..margin_cross_entropy.triton_math import (
    _INF,
    _INTERPRETED,
    _NO_COLUMN,
    _affine,
    _better,
    _class,
    _exp,
    _full_scale,
    _joined,
    _largest,
    _loss,
    _reference,
    _same,
    _slopes,
    _slot_of,
    _weight_total,
)

# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _product(a, b, sum, PRECISION: tl.constexpr):
    """a b + sum, in float32."""
    if _INTERPRETED:  # which multiplies bfloat16 as if it were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def _vectors(ptr, index, size, width, stride, FULL: tl.constexpr, BLOCK_D: tl.constexpr):
    """ptr[index, :] of a [size, width] matrix, [len(index), BLOCK_D]; 0 outside of it. FULL: width is BLOCK_D."""
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = index[:, None] < size
    if not FULL:
        mask = mask & (d < width)
    return tl.load(ptr + index.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0)


@triton.jit
def _class_vectors(slope_ptr, offset_ptr, scale, columns, classes):
    """slope and offset of the columns; offset is -inf, and with it every logit, where there is no class."""
    real = columns < classes
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + columns, mask=real, other=0.0)
    else:
        slope = scale
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + columns, mask=real, other=-_INF)
    else:
        offset = tl.where(real, 0.0, -_INF)
    return slope, offset


@triton.jit
def _raw(s, columns, classes, inverse_norm_ptr, linear_bias_ptr):
    """The logits x; -inf where there is no class."""
    real = columns < classes
    if inverse_norm_ptr is not None:
        s = s * tl.load(inverse_norm_ptr + columns, mask=real, other=0.0)
    if linear_bias_ptr is not None:
        s = s + tl.load(linear_bias_ptr + columns, mask=real, other=0.0).to(tl.float32)
    return tl.where(real, s, -_INF)


@triton.jit
def _target(
    row,
    x,  # [rows, BLOCK_D] float32, the rows' inputs
    factor_ptr,  # [C, D]
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    target_ptr,  # [N] int64
    share,
    coefficient_ptr,  # [1 or 2]
    weight_ptr,  # [C]
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    classes,
    width,
    factor_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    SLOT: tl.constexpr,
    ANGULAR: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A target of the rows as _slot_of has it, and its class_scale_y x_y."""
    index, valid, column = _class(target_ptr + row, classes, ignore_index)
    w = _vectors(factor_ptr, index, classes, width, factor_stride, FULL, BLOCK_D).to(tl.float32)
    logit = tl.sum(x * w, 1)
    if inverse_norm_ptr is not None:
        logit = logit * tl.load(inverse_norm_ptr + index)
    if linear_bias_ptr is not None:
        logit = logit + tl.load(linear_bias_ptr + index).to(tl.float32)
    slot = _slot_of(
        logit, index, valid, column, share, coefficient_ptr, weight_ptr, class_bias_ptr, class_scale_ptr, margin_ptr,
        classes, scale, margin, cos_margin, sin_margin, SLOT, ANGULAR,
    )  # fmt: skip
    if class_scale_ptr is not None:
        logit = logit * tl.load(class_scale_ptr + index)
    return slot, logit


@triton.jit
def _targets(
    row,
    rows,
    input_ptr,  # [N, D]
    factor_ptr,  # [C, D]
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    target_ptr,  # [N] int64
    mixed_target_ptr,  # [N] int64
    mix_lambda_ptr,  # 0-dim or [N]
    coefficient_ptr,  # [1 or 2]
    weight_ptr,  # [C]
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR
    classes,
    width,
    input_stride,
    factor_stride,
    mix_lambda_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    ANGULAR: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both targets of the rows, each with its class_scale_y x_y; the second repeats the first where there is one."""
    x = _vectors(input_ptr, row, rows, width, input_stride, FULL, BLOCK_D).to(tl.float32)
    share = 1.0
    if mixed_target_ptr is not None:
        share = tl.load(mix_lambda_ptr + row * mix_lambda_stride)
    a, cosine_a = _target(
        row, x, factor_ptr, inverse_norm_ptr, linear_bias_ptr, target_ptr, share, coefficient_ptr, weight_ptr,
        class_bias_ptr, class_scale_ptr, margin_ptr, classes, width, factor_stride, scale, margin, cos_margin,
        sin_margin, ignore_index, 0, ANGULAR, FULL, BLOCK_D,
    )  # fmt: skip
    b, cosine_b = a, cosine_a
    if mixed_target_ptr is not None:
        b, cosine_b = _target(
            row, x, factor_ptr, inverse_norm_ptr, linear_bias_ptr, mixed_target_ptr, 1.0 - share, coefficient_ptr,
            weight_ptr, class_bias_ptr, class_scale_ptr, margin_ptr, classes, width, factor_stride, scale, margin,
            cos_margin, sin_margin, ignore_index, 1, ANGULAR, FULL, BLOCK_D,
        )  # fmt: skip
    return a, cosine_a, b, cosine_b


@triton.jit
def _fold_kernel(
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C], any floating dtype
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    slope_ptr,  # [C]
    offset_ptr,  # [C]
    classes,
    scale,
    BLOCK: tl.constexpr,
):
    """slope and offset, each where it is wanted."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = column < classes
    slope = tl.zeros([BLOCK], tl.float32) + _full_scale(scale, learned_scale_ptr)
    if class_scale_ptr is not None:
        slope = slope * tl.load(class_scale_ptr + column, mask=real, other=0.0)
    if offset_ptr is not None:
        offset = slope * tl.load(linear_bias_ptr + column, mask=real, other=0.0).to(tl.float32)
        if class_bias_ptr is not None:
            offset += tl.load(class_bias_ptr + column, mask=real, other=0.0)
        tl.store(offset_ptr + column, offset, mask=real)
    if slope_ptr is not None:
        if inverse_norm_ptr is not None:
            slope = slope * tl.load(inverse_norm_ptr + column, mask=real, other=0.0)
        tl.store(slope_ptr + column, slope, mask=real)


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "tiles_per_split", "ignore_index"])
def _tiled_forward_kernel(
    input_ptr,  # [N, D], unit stride along D
    factor_ptr,  # [C, D], unit stride along D
    target_ptr,  # [N] int64
    mixed_target_ptr,  # [N] int64
    slope_ptr,  # [C]; the full scale if None
    offset_ptr,  # [C]; 0 if None
    weight_ptr,  # [C]
    inverse_norm_ptr,  # [C]; read for predictions
    linear_bias_ptr,  # [C]; read for predictions
    learned_scale_ptr,  # 0-dim
    partial_ptr,  # [2, 4 or 5, splits, N]: maximum, mass; where SMOOTH weighted, visited; for predictions the best
    partial_column_ptr,  # [splits, N] int32: the first column of the best; None without predictions
    rows,
    classes,
    width,
    tiles_per_split,
    input_stride,
    factor_stride,
    scale,
    ignore_index,
    SMOOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over the columns of one split that are no target of the row."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    x = _vectors(input_ptr, row, rows, width, input_stride, FULL, BLOCK_D)
    row = tl.minimum(row, rows - 1).to(tl.int64)
    _, _, column_a = _class(target_ptr + row, classes, ignore_index)
    if mixed_target_ptr is not None:
        _, _, column_b = _class(mixed_target_ptr + row, classes, ignore_index)
    scale = _full_scale(scale, learned_scale_ptr)
    peak = tl.full([BLOCK_N], -_INF, tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    visited = tl.zeros([BLOCK_N], tl.float32)
    best = tl.full([BLOCK_N], -_INF, tl.float32)
    best_column = tl.full([BLOCK_N], _NO_COLUMN, tl.int32)
    lane = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(classes, BLOCK_C))):
        begin = tile * BLOCK_C
        w = _vectors(factor_ptr, begin + lane, classes, width, factor_stride, FULL, BLOCK_D)
        s = _product(x, tl.trans(w), tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        columns = (begin + lane)[None, :]
        slope, offset = _class_vectors(slope_ptr, offset_ptr, scale, columns, classes)
        u = _affine(s, slope, offset)
        is_target = lane[None, :] == (column_a - begin)[:, None]
        if mixed_target_ptr is not None:
            is_target = is_target | (lane[None, :] == (column_b - begin)[:, None])
        u = tl.where(is_target, -_INF, u)
        before = peak
        peak = tl.maximum(peak, tl.max(u, 1))
        mass, weighted = _joined(before, mass, weighted, visited, peak)
        z = u - _reference(peak)[:, None]
        mass += tl.sum(_exp(z), 1)
        if SMOOTH:
            counted = (columns < classes) & ~is_target
            w_j = tl.full([1, BLOCK_C], 1.0, tl.float32)
            if weight_ptr is not None:
                w_j = tl.load(weight_ptr + columns, mask=columns < classes, other=0.0)
            weighted += tl.sum(tl.where(counted, w_j * z, 0.0), 1)
            visited += tl.sum(tl.where(counted, w_j, 0.0), 1)
        if partial_column_ptr is not None:
            raw = _raw(s, columns, classes, inverse_norm_ptr, linear_bias_ptr)
            tile_best = _largest(raw, 1)
            tile_column = tl.min(tl.where(_same(raw, tile_best[:, None]), columns, _NO_COLUMN), 1)
            best, best_column = _better(best, best_column, tile_best, tile_column)
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    out_ptr = partial_ptr + split * tl.cast(rows, tl.int64) + row
    tl.store(out_ptr, peak, mask=inside)
    tl.store(out_ptr + size, mass, mask=inside)
    if SMOOTH:
        tl.store(out_ptr + 2 * size, weighted, mask=inside)
        tl.store(out_ptr + 3 * size, visited, mask=inside)
    if partial_column_ptr is not None:
        tl.store(out_ptr + (4 if SMOOTH else 2) * size, best, mask=inside)
        tl.store(partial_column_ptr + split * tl.cast(rows, tl.int64) + row, best_column, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits", "ignore_index"])
def _finish_kernel(
    input_ptr,  # [N, D]
    factor_ptr,  # [C, D]
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    target_ptr,  # [N] int64
    mixed_target_ptr,  # [N] int64
    mix_lambda_ptr,  # 0-dim or [N]
    weight_ptr,  # [C]
    weight_total_ptr,  # 0-dim
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    learned_scale_ptr,  # 0-dim
    coefficient_ptr,  # [1 or 2]
    partial_ptr,  # [2, 3, 4 or 5, splits, N], see _tiled_forward_kernel
    partial_column_ptr,  # [splits, N] int32
    loss_ptr,  # [N]
    lse_ptr,  # [N]
    prediction_ptr,  # [N] int64
    rest_ptr,  # [2, N]
    rows,
    classes,
    width,
    splits,
    input_stride,
    factor_stride,
    mix_lambda_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    label_smoothing,
    ANGULAR: tl.constexpr,
    SMOOTH: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The splits merged in order, and the rows' scalars."""
    MIXED: tl.constexpr = mixed_target_ptr is not None
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    size = splits * tl.cast(rows, tl.int64)
    peak = tl.full([BLOCK], -_INF, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    visited = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], -_INF, tl.float32)
    best_column = tl.full([BLOCK], _NO_COLUMN, tl.int32)
    for split in range(splits):
        from_ptr = partial_ptr + split * tl.cast(rows, tl.int64) + row
        split_peak = tl.load(from_ptr)
        split_mass = tl.load(from_ptr + size)
        split_weighted, split_visited = tl.zeros_like(mass), tl.zeros_like(mass)
        if SMOOTH:
            split_weighted, split_visited = tl.load(from_ptr + 2 * size), tl.load(from_ptr + 3 * size)
        before = peak
        peak = tl.maximum(peak, split_peak)
        mass, weighted = _joined(before, mass, weighted, visited, peak)
        split_mass, split_weighted = _joined(split_peak, split_mass, split_weighted, split_visited, peak)
        mass += split_mass
        weighted += split_weighted
        visited += split_visited
        if prediction_ptr is not None:
            split_best = tl.load(from_ptr + (4 if SMOOTH else 2) * size)
            split_column = tl.load(partial_column_ptr + split * tl.cast(rows, tl.int64) + row)
            best, best_column = _better(best, best_column, split_best, split_column)
    peak = _reference(peak)
    a, _, b, _ = _targets(
        row, rows, input_ptr, factor_ptr, inverse_norm_ptr, linear_bias_ptr, target_ptr, mixed_target_ptr,
        mix_lambda_ptr, coefficient_ptr, weight_ptr, class_bias_ptr, class_scale_ptr, margin_ptr, classes, width,
        input_stride, factor_stride, mix_lambda_stride, _full_scale(scale, learned_scale_ptr), margin, cos_margin,
        sin_margin, ignore_index, ANGULAR, FULL, BLOCK_D,
    )  # fmt: skip
    loss, lse = _loss(
        peak, mass, weighted, a, b, _weight_total(weight_total_ptr, classes), label_smoothing,
        label_smoothing / classes, MIXED, SMOOTH,
    )  # fmt: skip
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(rest_ptr + row, peak, mask=inside)
    tl.store(rest_ptr + rows + row, mass, mask=inside)
    if prediction_ptr is not None:
        tl.store(prediction_ptr + row, best_column.to(tl.int64), mask=inside)


# --- backward --------------------------------------------------------------------------------------------------------

#: Rows of the terms: of every row the maximum, slope, smooth, and what the gradient of the scale has beside the
#: products; of each target the gradient of class_scale_y x_y over the scale, what the one of class_bias has beside it,
#: and that of margin_y over the scale.
_PEAK, _SLOPE, _SMOOTH, _TO_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_THROUGH, _TO_BIAS, _TO_MARGIN = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_SLOT_TERMS = tl.constexpr(3)  # from one target's to the other's


@triton.jit(do_not_specialize=["rows", "padded", "ignore_index"])
def _linear_terms_kernel(
    input_ptr,  # [N, D]
    factor_ptr,  # [C, D]
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    target_ptr,  # [N] int64
    mixed_target_ptr,  # [N] int64
    mix_lambda_ptr,  # 0-dim or [N]
    weight_ptr,  # [C]
    weight_total_ptr,  # 0-dim
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    learned_scale_ptr,  # 0-dim
    coefficient_ptr,  # [1 or 2]
    rest_ptr,  # [2, N]
    grad_loss_ptr,  # 0-dim or [N]
    grad_lse_ptr,  # 0-dim or [N]
    terms_ptr,  # [7 or 10, padded N]; rows past the end give 0 to every gradient
    columns_ptr,  # [1 or 2, padded N] int32: the targets' columns, -1 for none
    rows,
    padded,
    classes,
    width,
    input_stride,
    factor_stride,
    mix_lambda_stride,
    grad_loss_stride,
    grad_lse_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    label_smoothing,
    ANGULAR: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the gradients of a row are made of."""
    MIXED: tl.constexpr = mixed_target_ptr is not None
    out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = out < rows
    row = tl.minimum(out, rows - 1)
    peak = tl.load(rest_ptr + row)
    mass = tl.load(rest_ptr + rows + row)
    upstream = tl.load(grad_loss_ptr + row * grad_loss_stride)
    upstream_lse = tl.zeros([BLOCK], tl.float32)
    if grad_lse_ptr is not None:
        upstream_lse += tl.load(grad_lse_ptr + row * grad_lse_stride)
    a, cosine_a, b, cosine_b = _targets(
        row, rows, input_ptr, factor_ptr, inverse_norm_ptr, linear_bias_ptr, target_ptr, mixed_target_ptr,
        mix_lambda_ptr, coefficient_ptr, weight_ptr, class_bias_ptr, class_scale_ptr, margin_ptr, classes, width,
        input_stride, factor_stride, mix_lambda_stride, _full_scale(scale, learned_scale_ptr), margin, cos_margin,
        sin_margin, ignore_index, ANGULAR, FULL, BLOCK_D,
    )  # fmt: skip
    slope, smooth, plain_a, dv_a, plain_b, dv_b = _slopes(
        peak, mass, a, b, upstream, upstream_lse, _weight_total(weight_total_ptr, classes), label_smoothing,
        label_smoothing / classes, MIXED,
    )  # fmt: skip
    size = tl.cast(padded, tl.int64)
    out_ptr = terms_ptr + out
    mask = out < padded
    column_a, _, _, _, _, _, _, _, _ = a
    through_a, to_scale = _target_terms(out_ptr, size, a, cosine_a, plain_a, dv_a, mask)
    if MIXED:
        column_b, _, _, _, _, _, _, _, _ = b
        slot_ptr = out_ptr + _SLOT_TERMS * size
        through_b, to_scale_b = _target_terms(slot_ptr, size, b, cosine_b, plain_b, dv_b, mask)
        to_scale += to_scale_b
        both = column_a == column_b  # one column for both targets
        through_a, through_b = (
            tl.where(both, through_a + through_b, through_a),
            tl.where(both, through_a + through_b, through_b),
        )
        tl.store(slot_ptr + _THROUGH * size, through_b, mask=mask)
        tl.store(columns_ptr + size + out, tl.where(inside, column_b, -1), mask=mask)
    tl.store(out_ptr + _THROUGH * size, through_a, mask=mask)
    tl.store(columns_ptr + out, tl.where(inside, column_a, -1), mask=mask)
    tl.store(out_ptr + _PEAK * size, tl.where(inside, peak, _INF), mask=mask)
    tl.store(out_ptr + _SLOPE * size, tl.where(inside, slope, 0.0), mask=mask)
    tl.store(out_ptr + _SMOOTH * size, tl.where(inside, smooth, 0.0), mask=mask)
    tl.store(out_ptr + _TO_SCALE * size, tl.where(inside, to_scale, 0.0), mask=mask)


@triton.jit
def _target_terms(out_ptr, size, slot, cosine, plain, dv, mask):
    """A target's terms; stored but for what may have to be added up with the other target's."""
    column, _, _, _, _, _, phi, dphi_dc, dphi_dm = slot
    tl.store(out_ptr + _TO_BIAS * size, dv - dv * dphi_dc, mask=mask)
    tl.store(out_ptr + _TO_MARGIN * size, dv * dphi_dm, mask=mask)
    return plain + dv * dphi_dc, tl.where(column >= 0, dv * (phi - dphi_dc * cosine), 0.0)


@triton.jit(do_not_specialize=["rows", "padded", "tiles_per_split"])
def _grad_input_kernel(
    input_ptr,  # [N, D], unit stride along D
    factor_ptr,  # [C, D], unit stride along D
    slope_ptr,  # [C]; the full scale if None
    offset_ptr,  # [C]; 0 if None
    weight_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    terms_ptr,  # [7 or 10, padded N], see _linear_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    grad_ptr,  # [splits, N, D]
    rows,
    padded,
    classes,
    width,
    tiles_per_split,
    input_stride,
    factor_stride,
    scale,
    HAS_SLOPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of rows through the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _vectors(input_ptr, row, rows, width, input_stride, FULL, BLOCK_D)
    size = tl.cast(padded, tl.int64)
    own_ptr = terms_ptr + row
    peak = tl.load(own_ptr + _PEAK * size)
    row_slope = tl.load(own_ptr + _SLOPE * size)
    through_a = tl.load(own_ptr + _THROUGH * size)
    column_a = tl.load(columns_ptr + row)
    if MIXED:
        through_b = tl.load(own_ptr + (_THROUGH + _SLOT_TERMS) * size)
        column_b = tl.load(columns_ptr + size + row)
    if SMOOTH:
        smooth = tl.load(own_ptr + _SMOOTH * size)
    scale = _full_scale(scale, learned_scale_ptr)
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(classes, BLOCK_C))):
        begin = tile * BLOCK_C
        w = _vectors(factor_ptr, begin + lane, classes, width, factor_stride, FULL, BLOCK_D)
        s = _product(x, tl.trans(w), tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        columns = (begin + lane)[None, :]
        slope, offset = _class_vectors(slope_ptr, offset_ptr, scale, columns, classes)
        du = row_slope[:, None] * _exp(_affine(s, slope, offset) - peak[:, None])
        if SMOOTH:
            if weight_ptr is not None:
                du -= smooth[:, None] * tl.load(weight_ptr + columns, mask=columns < classes, other=0.0)
            else:
                du -= smooth[:, None]
        if MIXED:
            du = tl.where(lane[None, :] == (column_b - begin)[:, None], through_b[:, None], du)
        du = tl.where(lane[None, :] == (column_a - begin)[:, None], through_a[:, None], du)
        if HAS_SLOPE:
            du = du * slope
        grad = _product(du.to(w.dtype), w, grad, PRECISION)
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = (split * tl.cast(rows, tl.int64) + row)[:, None] * width + d
    tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (d < width))


@triton.jit(do_not_specialize=["rows", "padded", "blocks", "blocks_per_split"])
def _grad_factor_kernel(
    input_ptr,  # [N, D], unit stride along D
    factor_ptr,  # [C, D], unit stride along D
    slope_ptr,  # [C]; the full scale if None
    offset_ptr,  # [C]; 0 if None
    weight_ptr,  # [C]
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    terms_ptr,  # [7 or 10, padded N], see _linear_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    grad_ptr,  # [splits, C, D]; None where not needed
    sums_ptr,  # [splits, SUM_THROUGH + SUM_PRODUCT, C], sums over the rows of the gradient of class_scale_j x_ij over
    # the scale, and of its product with x_ij
    rows,
    padded,
    classes,
    width,
    blocks,
    blocks_per_split,
    input_stride,
    factor_stride,
    scale,
    HAS_SLOPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    MIXED: tl.constexpr,
    SUM_THROUGH: tl.constexpr,
    SUM_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a block of classes through the rows of one split: tiles are [BLOCK_C, BLOCK_N]."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = _vectors(factor_ptr, column, classes, width, factor_stride, FULL, BLOCK_D)
    columns = column[:, None]
    real = columns < classes
    scale = _full_scale(scale, learned_scale_ptr)
    slope, offset = _class_vectors(slope_ptr, offset_ptr, scale, columns, classes)
    if SMOOTH and weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=real, other=0.0)
    size = tl.cast(padded, tl.int64)
    grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    sum_through = tl.zeros([BLOCK_C], tl.float32)
    sum_product = tl.zeros([BLOCK_C], tl.float32)
    split = tl.program_id(1)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        x = _vectors(input_ptr, row, rows, width, input_stride, FULL, BLOCK_D)
        s = _product(w, tl.trans(x), tl.zeros([BLOCK_C, BLOCK_N], tl.float32), PRECISION)
        own_ptr = terms_ptr + row
        du = _exp(_affine(s, slope, offset) - tl.load(own_ptr + _PEAK * size)[None, :])
        du = tl.load(own_ptr + _SLOPE * size)[None, :] * du
        if SMOOTH:
            smooth = tl.load(own_ptr + _SMOOTH * size)[None, :]
            if weight_ptr is not None:
                smooth = smooth * weight
            du -= smooth
        if MIXED:
            column_b = tl.load(columns_ptr + size + row)[None, :]
            du = tl.where(columns == column_b, tl.load(own_ptr + (_THROUGH + _SLOT_TERMS) * size)[None, :], du)
        column_a = tl.load(columns_ptr + row)[None, :]
        du = tl.where(columns == column_a, tl.load(own_ptr + _THROUGH * size)[None, :], du)
        if SUM_THROUGH:
            sum_through += tl.sum(du, 1)
        if SUM_PRODUCT:
            sum_product += tl.sum(du * s, 1)
        if grad_ptr is not None:
            if HAS_SLOPE:
                du = du * slope
            grad = _product(du.to(x.dtype), x, grad, PRECISION)
    if grad_ptr is not None:
        d = tl.arange(0, BLOCK_D)[None, :]
        offsets = (split * tl.cast(classes, tl.int64) + column)[:, None] * width + d
        tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=real & (d < width))
    if sums_ptr is not None:
        out_ptr = sums_ptr + split.to(tl.int64) * (SUM_THROUGH + SUM_PRODUCT) * classes + column
        if SUM_THROUGH:
            tl.store(out_ptr, sum_through, mask=column < classes)
        if SUM_PRODUCT:
            tl.store(out_ptr + SUM_THROUGH * classes, sum_product, mask=column < classes)


@triton.jit(do_not_specialize=["padded", "blocks", "blocks_per_split"])
def _target_sums_kernel(
    terms_ptr,  # [7 or 10, padded N], see _linear_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    sums_ptr,  # [splits, SUM_BIAS + SUM_MARGIN, C]
    padded,
    classes,
    blocks,
    blocks_per_split,
    MIXED: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    SUM_MARGIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the rows, by target, of what class_bias gets beside the logits' gradient and of what margin gets."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    size = tl.cast(padded, tl.int64)
    sum_bias = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)  # rows are added up at the end: no exchange in the loop
    sum_margin = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    split = tl.program_id(1)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        for slot in tl.static_range(2 if MIXED else 1):
            is_target = column[:, None] == tl.load(columns_ptr + slot * size + row)[None, :]
            own_ptr = terms_ptr + slot * _SLOT_TERMS * size + row
            if SUM_BIAS:
                sum_bias += tl.where(is_target, tl.load(own_ptr + _TO_BIAS * size)[None, :], 0.0)
            if SUM_MARGIN:
                sum_margin += tl.where(is_target, tl.load(own_ptr + _TO_MARGIN * size)[None, :], 0.0)
    out_ptr = sums_ptr + split.to(tl.int64) * (SUM_BIAS + SUM_MARGIN) * classes + column
    if SUM_BIAS:
        tl.store(out_ptr, tl.sum(sum_bias, 1), mask=column < classes)
    if SUM_MARGIN:
        tl.store(out_ptr + SUM_BIAS * classes, tl.sum(sum_margin, 1), mask=column < classes)


@triton.jit
def _merged_sum(sums_ptr, kind, kinds, splits, column, classes):
    """One kind of a [splits, kinds, C] array's sums, the splits added up in order."""
    total = tl.zeros(column.shape, tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + (split * kinds + kind) * tl.cast(classes, tl.int64) + column, mask=column < classes)
    return total


@triton.jit(do_not_specialize=["splits", "target_splits"])
def _class_sums_kernel(
    sums_ptr,  # [splits, SUM_THROUGH + SUM_PRODUCT, C], see _grad_factor_kernel
    target_sums_ptr,  # [target splits, SUM_BIAS + SUM_MARGIN, C], see _target_sums_kernel
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    grad_linear_bias_ptr,  # [C], None where not needed
    grad_class_bias_ptr,  # [C], None where not needed
    grad_class_scale_ptr,  # [C], None where not needed
    grad_class_margin_ptr,  # [C], None where not needed
    to_scale_ptr,  # [C], each class's part of the gradient of the scale; None where not needed
    classes,
    splits,
    target_splits,
    scale,
    SUM_THROUGH: tl.constexpr,
    SUM_PRODUCT: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    SUM_MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the class vectors from the sums of all splits."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = column < classes
    scale = _full_scale(scale, learned_scale_ptr)
    class_scale = 1.0
    if class_scale_ptr is not None:
        class_scale = tl.load(class_scale_ptr + column, mask=real)
    if SUM_THROUGH:
        through = _merged_sum(sums_ptr, 0, SUM_THROUGH + SUM_PRODUCT, splits, column, classes)
    if grad_linear_bias_ptr is not None:
        grad = scale * class_scale * through
        tl.store(grad_linear_bias_ptr + column, grad.to(grad_linear_bias_ptr.dtype.element_ty), mask=real)
    if grad_class_bias_ptr is not None:
        grad = through
        if SUM_BIAS:
            grad += _merged_sum(target_sums_ptr, 0, SUM_BIAS + SUM_MARGIN, target_splits, column, classes)
        tl.store(grad_class_bias_ptr + column, grad, mask=real)
    if SUM_PRODUCT:
        product = _merged_sum(sums_ptr, SUM_THROUGH, SUM_THROUGH + SUM_PRODUCT, splits, column, classes)
        if inverse_norm_ptr is not None:
            product = product * tl.load(inverse_norm_ptr + column, mask=real)
        if linear_bias_ptr is not None:
            product += through * tl.load(linear_bias_ptr + column, mask=real).to(tl.float32)
        if grad_class_scale_ptr is not None:
            tl.store(grad_class_scale_ptr + column, scale * product, mask=real)
        if to_scale_ptr is not None:
            tl.store(to_scale_ptr + column, class_scale * product, mask=real)
    if SUM_MARGIN:
        grad = _merged_sum(target_sums_ptr, SUM_BIAS, SUM_BIAS + SUM_MARGIN, target_splits, column, classes)
        tl.store(grad_class_margin_ptr + column, scale * grad, mask=real)
