"""Backward of the tiled strategy: logits are computed again, tile by tile.

One program per block of rows (and split of the classes) makes the gradient of the input; one per block of classes (and
split of the rows) those of the factor and the class vectors. Each does 4 D operations per logit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gemm import launch as gemm
from ..._gemm.launch import PADDING, Launch, add_splits, most_splits, partial_gradients
from ..._gemm.triton_tiles import load_vectors, tile_product
from ..._rows.triton_math import (
    INF,
    add_shared_column,
    affine,
    fast_exp,
    load_scale,
    load_upstream,
    load_weight_total,
    row_slopes,
)
from ..._rows.triton_options import per_row
from ..._triton import launch_with
from ..arguments import DIFFERENTIABLE, Arguments
from .launch import block_of_rows
from .tiles import common_arguments, launches_for, load_class_vectors, load_targets

#: Rows and classes of a tile of linear_margin_cross_entropy_target_sums_kernel.
_TARGET_SUMS = (128, 32)
#: The terms of every row: the maximum, slope, smooth, and the gradient of the scale without the products.
PEAK, SLOPE, SMOOTH, TO_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
#: The terms of each target: the gradient of class_scale_y x_y over the scale, the gradient of class_bias without it,
#: and the gradient of margin_y over the scale.
THROUGH, TO_BIAS, TO_MARGIN = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
SLOT_TERMS = tl.constexpr(3)  # from one target's to the other's


@triton.jit(do_not_specialize=["rows", "padded", "ignore_index"])
def linear_margin_cross_entropy_terms_kernel(
    input_ptr,  # [N, D]
    factor_ptr,  # [C, D]
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    o,  # KernelOptions
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
    grad_loss_stride,
    grad_lse_stride,
    ignore_index,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the terms that the gradients of a row are made of."""
    out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = out < rows
    row = tl.minimum(out, rows - 1)
    peak, mass, upstream, upstream_lse = load_upstream(
        rest_ptr, grad_loss_ptr, grad_lse_ptr, row, rows, grad_loss_stride, grad_lse_stride
    )
    a, cosine_a, b, cosine_b = load_targets(
        row, rows, input_ptr, factor_ptr, inverse_norm_ptr, linear_bias_ptr, o, classes, width, input_stride,
        factor_stride, ignore_index, FULL, BLOCK_D,
    )  # fmt: skip
    slopes = row_slopes(
        peak, mass, a, b, upstream, upstream_lse, load_weight_total(o, classes),
        o.label_smoothing / classes, o,
    )  # fmt: skip
    size = tl.cast(padded, tl.int64)
    out_ptr = terms_ptr + out
    mask = out < padded
    through_a, to_scale = store_target_terms(out_ptr, size, a, cosine_a, slopes.a, mask)
    if o.mixed_target_ptr is not None:
        slot_ptr = out_ptr + SLOT_TERMS * size
        through_b, to_scale_b = store_target_terms(slot_ptr, size, b, cosine_b, slopes.b, mask)
        to_scale += to_scale_b
        through_a, through_b = add_shared_column(a.column, through_a, b.column, through_b)
        tl.store(slot_ptr + THROUGH * size, through_b, mask=mask)
        tl.store(columns_ptr + size + out, tl.where(inside, b.column, -1), mask=mask)
    tl.store(out_ptr + THROUGH * size, through_a, mask=mask)
    tl.store(columns_ptr + out, tl.where(inside, a.column, -1), mask=mask)
    tl.store(out_ptr + PEAK * size, tl.where(inside, peak, INF), mask=mask)
    tl.store(out_ptr + SLOPE * size, tl.where(inside, slopes.slope, 0.0), mask=mask)
    tl.store(out_ptr + SMOOTH * size, tl.where(inside, slopes.smooth, 0.0), mask=mask)
    tl.store(out_ptr + TO_SCALE * size, tl.where(inside, to_scale, 0.0), mask=mask)


@triton.jit
def store_target_terms(out_ptr, size, slot, cosine, gradient, mask):
    """Store a target's terms; return those that may have to be added to the other target's."""
    plain, dv = gradient.plain, gradient.shifted
    tl.store(out_ptr + TO_BIAS * size, dv - dv * slot.dphi_dc, mask=mask)
    tl.store(out_ptr + TO_MARGIN * size, dv * slot.dphi_dm, mask=mask)
    return plain + dv * slot.dphi_dc, tl.where(slot.column >= 0, dv * (slot.phi - slot.dphi_dc * cosine), 0.0)


@triton.jit(do_not_specialize=["rows", "padded", "tiles_per_split"])
def linear_margin_cross_entropy_grad_input_kernel(
    input_ptr,  # [N, D], unit stride along D
    factor_ptr,  # [C, D], unit stride along D
    slope_ptr,  # [C]; the full scale if None
    offset_ptr,  # [C]; 0 if None
    o,  # KernelOptions
    terms_ptr,  # [7 or 10, padded N], see linear_margin_cross_entropy_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    grad_ptr,  # [splits, N, D]
    rows,
    padded,
    classes,
    width,
    tiles_per_split,
    input_stride,
    factor_stride,
    HAS_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient of a block of rows through the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = load_vectors(input_ptr, row, rows, width, input_stride, FULL, BLOCK_D)
    size = tl.cast(padded, tl.int64)
    own_ptr = terms_ptr + row
    peak = tl.load(own_ptr + PEAK * size)
    row_slope = tl.load(own_ptr + SLOPE * size)
    through_a = tl.load(own_ptr + THROUGH * size)
    column_a = tl.load(columns_ptr + row)
    if o.mixed_target_ptr is not None:
        through_b = tl.load(own_ptr + (THROUGH + SLOT_TERMS) * size)
        column_b = tl.load(columns_ptr + size + row)
    if o.smooth:
        smooth = tl.load(own_ptr + SMOOTH * size)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(classes, BLOCK_C))):
        begin = tile * BLOCK_C
        w = load_vectors(factor_ptr, begin + lane, classes, width, factor_stride, FULL, BLOCK_D)
        s = tile_product(x, tl.trans(w), tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        columns = (begin + lane)[None, :]
        slope, offset = load_class_vectors(slope_ptr, offset_ptr, scale, columns, classes)
        du = row_slope[:, None] * fast_exp(affine(s, slope, offset) - peak[:, None])
        if o.smooth:
            if o.weight_ptr is not None:
                du -= smooth[:, None] * tl.load(o.weight_ptr + columns, mask=columns < classes, other=0.0)
            else:
                du -= smooth[:, None]
        if o.mixed_target_ptr is not None:
            du = tl.where(lane[None, :] == (column_b - begin)[:, None], through_b[:, None], du)
        du = tl.where(lane[None, :] == (column_a - begin)[:, None], through_a[:, None], du)
        if HAS_SLOPE:
            du = du * slope
        grad = tile_product(du.to(w.dtype), w, grad, PRECISION)
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = (split * tl.cast(rows, tl.int64) + row)[:, None] * width + d
    tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (d < width))


@triton.jit(do_not_specialize=["rows", "padded", "blocks", "blocks_per_split"])
def linear_margin_cross_entropy_grad_factor_kernel(
    input_ptr,  # [N, D], unit stride along D
    factor_ptr,  # [C, D], unit stride along D
    slope_ptr,  # [C]; the full scale if None
    offset_ptr,  # [C]; 0 if None
    o,  # KernelOptions
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    terms_ptr,  # [7 or 10, padded N], see linear_margin_cross_entropy_terms_kernel
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
    HAS_SLOPE: tl.constexpr,
    SUM_THROUGH: tl.constexpr,
    SUM_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients of a block of classes through the rows of one split, in tiles [BLOCK_C, BLOCK_N]."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = load_vectors(factor_ptr, column, classes, width, factor_stride, FULL, BLOCK_D)
    columns = column[:, None]
    real = columns < classes
    scale = load_scale(o.scale, o.learned_scale_ptr)
    slope, offset = load_class_vectors(slope_ptr, offset_ptr, scale, columns, classes)
    if o.smooth and o.weight_ptr is not None:
        weight = tl.load(o.weight_ptr + columns, mask=real, other=0.0)
    size = tl.cast(padded, tl.int64)
    grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    sum_through = tl.zeros([BLOCK_C], tl.float32)
    sum_product = tl.zeros([BLOCK_C], tl.float32)
    split = tl.program_id(1)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        x = load_vectors(input_ptr, row, rows, width, input_stride, FULL, BLOCK_D)
        s = tile_product(w, tl.trans(x), tl.zeros([BLOCK_C, BLOCK_N], tl.float32), PRECISION)
        own_ptr = terms_ptr + row
        du = fast_exp(affine(s, slope, offset) - tl.load(own_ptr + PEAK * size)[None, :])
        du = tl.load(own_ptr + SLOPE * size)[None, :] * du
        if o.smooth:
            smooth = tl.load(own_ptr + SMOOTH * size)[None, :]
            if o.weight_ptr is not None:
                smooth = smooth * weight
            du -= smooth
        if o.mixed_target_ptr is not None:
            column_b = tl.load(columns_ptr + size + row)[None, :]
            du = tl.where(columns == column_b, tl.load(own_ptr + (THROUGH + SLOT_TERMS) * size)[None, :], du)
        column_a = tl.load(columns_ptr + row)[None, :]
        du = tl.where(columns == column_a, tl.load(own_ptr + THROUGH * size)[None, :], du)
        if SUM_THROUGH:
            sum_through += tl.sum(du, 1)
        if SUM_PRODUCT:
            sum_product += tl.sum(du * s, 1)
        if grad_ptr is not None:
            if HAS_SLOPE:
                du = du * slope
            grad = tile_product(du.to(x.dtype), x, grad, PRECISION)
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
def linear_margin_cross_entropy_target_sums_kernel(
    o,  # KernelOptions
    terms_ptr,  # [7 or 10, padded N], see linear_margin_cross_entropy_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    sums_ptr,  # [splits, SUM_BIAS + SUM_MARGIN, C]
    padded,
    classes,
    blocks,
    blocks_per_split,
    SUM_BIAS: tl.constexpr,
    SUM_MARGIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the targets' terms of class_bias and of the margin over the rows, by class."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    size = tl.cast(padded, tl.int64)
    sum_bias = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)  # rows are added up at the end: no exchange in the loop
    sum_margin = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    split = tl.program_id(1)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        for slot in tl.static_range(2 if o.mixed_target_ptr is not None else 1):
            is_target = column[:, None] == tl.load(columns_ptr + slot * size + row)[None, :]
            own_ptr = terms_ptr + slot * SLOT_TERMS * size + row
            if SUM_BIAS:
                sum_bias += tl.where(is_target, tl.load(own_ptr + TO_BIAS * size)[None, :], 0.0)
            if SUM_MARGIN:
                sum_margin += tl.where(is_target, tl.load(own_ptr + TO_MARGIN * size)[None, :], 0.0)
    out_ptr = sums_ptr + split.to(tl.int64) * (SUM_BIAS + SUM_MARGIN) * classes + column
    if SUM_BIAS:
        tl.store(out_ptr, tl.sum(sum_bias, 1), mask=column < classes)
    if SUM_MARGIN:
        tl.store(out_ptr + SUM_BIAS * classes, tl.sum(sum_margin, 1), mask=column < classes)


@triton.jit
def add_sums(sums_ptr, kind, kinds, splits, column, classes):
    """Return one kind of the sums [splits, kinds, C], the splits added up in order."""
    total = tl.zeros(column.shape, tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + (split * kinds + kind) * tl.cast(classes, tl.int64) + column, mask=column < classes)
    return total


@triton.jit(do_not_specialize=["splits", "target_splits"])
def linear_margin_cross_entropy_class_sums_kernel(
    sums_ptr,  # [splits, SUM_THROUGH + SUM_PRODUCT, C], see linear_margin_cross_entropy_grad_factor_kernel
    target_sums_ptr,  # [target splits, SUM_BIAS + SUM_MARGIN, C], see linear_margin_cross_entropy_target_sums_kernel
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C]
    o,  # KernelOptions
    grad_linear_bias_ptr,  # [C], None where not needed
    grad_class_bias_ptr,  # [C], None where not needed
    grad_class_scale_ptr,  # [C], None where not needed
    grad_class_margin_ptr,  # [C], None where not needed
    to_scale_ptr,  # [C], each class's part of the gradient of the scale; None where not needed
    classes,
    splits,
    target_splits,
    SUM_THROUGH: tl.constexpr,
    SUM_PRODUCT: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    SUM_MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of the class vectors from the sums of all splits."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = column < classes
    scale = load_scale(o.scale, o.learned_scale_ptr)
    class_scale = 1.0
    if o.class_scale_ptr is not None:
        class_scale = tl.load(o.class_scale_ptr + column, mask=real)
    if SUM_THROUGH:
        through = add_sums(sums_ptr, 0, SUM_THROUGH + SUM_PRODUCT, splits, column, classes)
    if grad_linear_bias_ptr is not None:
        grad = scale * class_scale * through
        tl.store(grad_linear_bias_ptr + column, grad.to(grad_linear_bias_ptr.dtype.element_ty), mask=real)
    if grad_class_bias_ptr is not None:
        grad = through
        if SUM_BIAS:
            grad += add_sums(target_sums_ptr, 0, SUM_BIAS + SUM_MARGIN, target_splits, column, classes)
        tl.store(grad_class_bias_ptr + column, grad, mask=real)
    if SUM_PRODUCT:
        product = add_sums(sums_ptr, SUM_THROUGH, SUM_THROUGH + SUM_PRODUCT, splits, column, classes)
        if inverse_norm_ptr is not None:
            product = product * tl.load(inverse_norm_ptr + column, mask=real)
        if linear_bias_ptr is not None:
            product += through * tl.load(linear_bias_ptr + column, mask=real).to(tl.float32)
        if grad_class_scale_ptr is not None:
            tl.store(grad_class_scale_ptr + column, scale * product, mask=real)
        if to_scale_ptr is not None:
            tl.store(to_scale_ptr + column, class_scale * product, mask=real)
    if SUM_MARGIN:
        grad = add_sums(target_sums_ptr, SUM_BIAS, SUM_BIAS + SUM_MARGIN, target_splits, column, classes)
        tl.store(grad_class_margin_ptr + column, scale * grad, mask=real)


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    rest: Tensor,
    a: Arguments,
    inverse_norm: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of ``DIFFERENTIABLE``; [0] where not needed. Upstream gradients are 0-dim or [N, 1].

    linear_weight's gradient is the one through the products alone: the caller adds the part through ``inverse_norm``.
    """
    n, classes = a.input.shape[0], a.classes
    sources = [a.input, a.linear_weight, a.linear_bias, *(getattr(a.options, name) for name in DIFFERENTIABLE[3:])]
    needs = [need and name != "target" for need, name in zip(needs, DIFFERENTIABLE, strict=True)]
    if n == 0:
        return [torch.zeros_like(t) if need else rest.new_empty((0,)) for t, need in zip(sources, needs, strict=True)]
    grads = [rest.new_empty((0,)) for _ in needs]
    if not any(needs):
        return grads
    per_loss, grad_loss_stride = per_row(grad_loss, rest.shape[1:])
    per_lse, grad_lse_stride = per_row(grad_lse, rest.shape[1:])
    with torch.cuda.device_of(a.input):
        arguments = common_arguments(a, inverse_norm)
        width, padded = arguments["width"], triton.cdiv(n, PADDING) * PADDING
        launches = launches_for(a, arguments)
        mixed = a.options.mixed_target is not None
        arguments |= {
            "rest_ptr": rest,
            "grad_loss_ptr": per_loss,
            "grad_lse_ptr": per_lse,
            "grad_loss_stride": grad_loss_stride,
            "grad_lse_stride": grad_lse_stride,
            "terms_ptr": rest.new_empty((10 if mixed else 7, padded)),
            "columns_ptr": rest.new_empty((1 + mixed, padded), dtype=torch.int32),
            "padded": padded,
        }
        rows = block_of_rows(width)
        launch_with(linear_margin_cross_entropy_terms_kernel, (triton.cdiv(padded, rows["BLOCK"]),), arguments, **rows)
        if needs[0]:
            launch = launches.grad_input
            blocks, tiles = triton.cdiv(n, launch.block_n), triton.cdiv(classes, launch.block_c)
            per_split = gemm.tiles_per_split(blocks, tiles, launch.together, most_splits(n * width))
            grad = partial_gradients(triton.cdiv(tiles, per_split), a.input, a.input.dtype)
            arguments |= {"grad_ptr": grad, "tiles_per_split": per_split}
            launch_with(
                linear_margin_cross_entropy_grad_input_kernel, (blocks, len(grad)), arguments, **launch.constants
            )
            grads[0] = add_splits(grad, a.input.dtype)
        if any(needs[1:]):
            _class_gradients(a, needs, grads, arguments, launches.grad_factor)
    return grads


def _class_gradients(
    a: Arguments, needs: list[bool], grads: list[Tensor], arguments: dict[str, Any], launch: Launch
) -> None:
    """Put every gradient except the input's into ``grads``."""
    n, classes, rest = a.input.shape[0], a.classes, arguments["rest_ptr"]
    _, need_weight, need_linear, _, need_bias, need_scale, need_margin, need_learned = needs
    product = need_scale or need_learned
    through = need_linear or need_bias or (product and a.linear_bias is not None)
    extra = need_bias and a.options.angular
    arguments |= {
        "grad_ptr": None,
        "sums_ptr": None,
        "target_sums_ptr": None,
        "splits": 0,
        "target_splits": 0,
        "SUM_THROUGH": through,
        "SUM_PRODUCT": product,
        "SUM_BIAS": extra,
        "SUM_MARGIN": need_margin,
    }
    if need_weight or through or product:
        blocks, tiles = triton.cdiv(n, launch.block_n), triton.cdiv(classes, launch.block_c)
        per_split = gemm.tiles_per_split(tiles, blocks, launch.together, most_splits(classes * a.input.shape[1]))
        splits = triton.cdiv(blocks, per_split)
        grad = partial_gradients(splits, a.factor, a.linear_weight.dtype) if need_weight else None
        sums = rest.new_empty((splits, through + product, classes)) if through or product else None
        arguments |= {"grad_ptr": grad, "blocks": blocks, "blocks_per_split": per_split}
        arguments |= {"sums_ptr": sums, "splits": splits}
        launch_with(linear_margin_cross_entropy_grad_factor_kernel, (tiles, splits), arguments, **launch.constants)
        if grad is not None:
            grads[1] = add_splits(grad, a.linear_weight.dtype)
    if extra or need_margin:
        block_n, block_c = _TARGET_SUMS
        blocks, tiles = triton.cdiv(n, block_n), triton.cdiv(classes, block_c)
        per_split = gemm.tiles_per_split(tiles, blocks, 8)
        splits = triton.cdiv(blocks, per_split)
        target_sums = rest.new_empty((splits, extra + need_margin, classes))
        own = {"sums_ptr": target_sums, "blocks": blocks, "blocks_per_split": per_split}
        blocks_of = {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4}
        launch_with(linear_margin_cross_entropy_target_sums_kernel, (tiles, splits), arguments | own, **blocks_of)
        arguments |= {"target_sums_ptr": target_sums, "target_splits": splits}
    if through or product or need_margin:
        outputs = {"linear_bias": 2, "class_bias": 4, "class_scale": 5, "class_margin": 6}
        for name, position in outputs.items():
            if needs[position]:
                like: Any = a.linear_bias if name == "linear_bias" else getattr(a.options, name)
                grads[position] = like.new_empty((classes,))
            arguments[f"grad_{name}_ptr"] = grads[position] if needs[position] else None
        to_scale = rest.new_empty((classes,)) if need_learned else None
        launch_with(
            linear_margin_cross_entropy_class_sums_kernel, (triton.cdiv(classes, 256),),
            arguments | {"to_scale_ptr": to_scale}, BLOCK=256, num_warps=4,
        )  # fmt: skip
        if to_scale is not None:
            grads[7] = a.options.scale * (to_scale.sum() + arguments["terms_ptr"][TO_SCALE.value].sum())
