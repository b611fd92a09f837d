"""Backward of the tiled strategy: logits are computed again, tile by tile.

One program per block of rows (and split of the classes) makes the gradient of the input; one per block of classes (and
split of the rows) those of the factor and the class vectors. Each does 4 D operations per logit.
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
    inner_products,
    load_left,
    load_right,
    split_tiles,
    store_gradient,
    store_sums,
    tile_product,
)
from ..._rows.triton_math import (
    INF,
    add_shared_column,
    affine,
    fast_exp,
    load_scale,
    load_smooth_share,
    load_smooth_total,
    load_upstream,
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


class ClassGradients(NamedTuple):
    """Gradients of the class vectors, one argument of a kernel: pointers to [C], None where not needed."""

    linear_bias_ptr: Any
    class_bias_ptr: Any
    class_scale_ptr: Any
    class_margin_ptr: Any
    scale_ptr: Any  # each class's part of the gradient of the scale


@triton.jit(do_not_specialize=["rows", "padded", "ignore_index"])
def linear_margin_cross_entropy_terms_kernel(
    f,  # Factors: inputs and classes
    v,  # ClassVectors
    o,  # KernelOptions
    rest_ptr,  # [2, N]
    grad_loss_ptr,  # 0-dim or [N]
    grad_lse_ptr,  # 0-dim or [N]
    terms_ptr,  # [7 or 10, padded N]; rows past the end give 0 to every gradient
    columns_ptr,  # [1 or 2, padded N] int32: the targets' columns, -1 for none
    rows,
    padded,
    classes,
    grad_loss_stride,
    grad_lse_stride,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Compute the terms that the gradients of a row are made of."""
    out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = out < rows
    row = tl.minimum(out, rows - 1)
    peak, mass, upstream, upstream_lse = load_upstream(
        rest_ptr, grad_loss_ptr, grad_lse_ptr, row, rows, grad_loss_stride, grad_lse_stride
    )
    a, cosine_a, b, cosine_b = load_targets(f, v, o, row, rows, classes, ignore_index)
    smooth_share = load_smooth_share(o, classes)
    slopes = row_slopes(peak, mass, a, b, upstream, upstream_lse, load_smooth_total(o, classes), smooth_share, o)
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
    f,  # Factors: inputs and classes
    v,  # ClassVectors
    o,  # KernelOptions
    terms_ptr,  # [7 or 10, padded N], see linear_margin_cross_entropy_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    grad_ptr,  # [splits, N, D]
    rows,
    padded,
    classes,
    tiles_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of a block of rows through the columns of one split."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = load_left(f, row, rows)
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
    grad = tl.zeros([BLOCK_N, f.block_d], tl.float32)
    lane = tl.arange(0, BLOCK_C)
    split, first, end = split_tiles(tiles_per_split, classes, BLOCK_C)
    for tile in range(first, end):
        begin = tile * BLOCK_C
        w = load_right(f, begin + lane, classes)
        s = inner_products(x, w, f)
        columns = (begin + lane)[None, :]
        slope, offset = load_class_vectors(v, scale, columns, classes)
        du = row_slope[:, None] * fast_exp(affine(s, slope, offset) - peak[:, None])
        if o.smooth:
            if o.smooth_weight_ptr is not None:
                du -= smooth[:, None] * tl.load(o.smooth_weight_ptr + columns, mask=columns < classes, other=0.0)
            else:
                du -= smooth[:, None]
        if o.mixed_target_ptr is not None:
            du = tl.where(lane[None, :] == (column_b - begin)[:, None], through_b[:, None], du)
        du = tl.where(lane[None, :] == (column_a - begin)[:, None], through_a[:, None], du)
        if v.has_slope:
            du = du * slope
        grad = tile_product(du.to(w.dtype), w, grad, f.precision)
    store_gradient(grad_ptr, grad, split, row, rows, f)


@triton.jit(do_not_specialize=["rows", "padded", "blocks_per_split"])
def linear_margin_cross_entropy_grad_factor_kernel(
    f,  # Factors: inputs and classes
    v,  # ClassVectors
    o,  # KernelOptions
    terms_ptr,  # [7 or 10, padded N], see linear_margin_cross_entropy_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    grad_ptr,  # [splits, C, D]; None where not needed
    sums,  # ColumnSums of the gradient of class_scale_j x_ij over the scale, and of its product with x_ij
    rows,
    padded,
    classes,
    blocks_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradients of a block of classes through the rows of one split, in tiles [BLOCK_C, BLOCK_N]."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = load_right(f, column, classes)
    columns = column[:, None]
    scale = load_scale(o.scale, o.learned_scale_ptr)
    slope, offset = load_class_vectors(v, scale, columns, classes)
    if o.smooth and o.smooth_weight_ptr is not None:
        weight = tl.load(o.smooth_weight_ptr + columns, mask=columns < classes, other=0.0)
    size = tl.cast(padded, tl.int64)
    grad = tl.zeros([BLOCK_C, f.block_d], tl.float32)
    sum_through = tl.zeros([BLOCK_C], tl.float32)
    sum_product = tl.zeros([BLOCK_C], tl.float32)
    split, first, end = split_tiles(blocks_per_split, rows, BLOCK_N)
    for block in range(first, end):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        x = load_left(f, row, rows)
        s = inner_products(w, x, f)
        own_ptr = terms_ptr + row
        du = fast_exp(affine(s, slope, offset) - tl.load(own_ptr + PEAK * size)[None, :])
        du = tl.load(own_ptr + SLOPE * size)[None, :] * du
        if o.smooth:
            smooth = tl.load(own_ptr + SMOOTH * size)[None, :]
            if o.smooth_weight_ptr is not None:
                smooth = smooth * weight
            du -= smooth
        if o.mixed_target_ptr is not None:
            column_b = tl.load(columns_ptr + size + row)[None, :]
            du = tl.where(columns == column_b, tl.load(own_ptr + (THROUGH + SLOT_TERMS) * size)[None, :], du)
        column_a = tl.load(columns_ptr + row)[None, :]
        du = tl.where(columns == column_a, tl.load(own_ptr + THROUGH * size)[None, :], du)
        if sums.first:
            sum_through += tl.sum(du, 1)
        if sums.second:
            sum_product += tl.sum(du * s, 1)
        if grad_ptr is not None:
            if v.has_slope:
                du = du * slope
            grad = tile_product(du.to(x.dtype), x, grad, f.precision)
    if grad_ptr is not None:
        store_gradient(grad_ptr, grad, split, column, classes, f)
    store_sums(sums, sum_through, sum_product, split, column, classes, column < classes)


@triton.jit(do_not_specialize=["rows", "padded", "blocks_per_split"])
def linear_margin_cross_entropy_target_sums_kernel(
    o,  # KernelOptions
    terms_ptr,  # [7 or 10, padded N], see linear_margin_cross_entropy_terms_kernel
    columns_ptr,  # [1 or 2, padded N] int32
    target_sums,  # ColumnSums of the targets' terms of class_bias and of the margin
    rows,
    padded,
    classes,
    blocks_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the targets' terms of class_bias and of the margin over the rows, by class."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    size = tl.cast(padded, tl.int64)
    sum_bias = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)  # rows are added up at the end: no exchange in the loop
    sum_margin = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    split, first, end = split_tiles(blocks_per_split, rows, BLOCK_N)
    for block in range(first, end):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        for slot in tl.static_range(2 if o.mixed_target_ptr is not None else 1):
            is_target = column[:, None] == tl.load(columns_ptr + slot * size + row)[None, :]
            own_ptr = terms_ptr + slot * SLOT_TERMS * size + row
            if target_sums.first:
                sum_bias += tl.where(is_target, tl.load(own_ptr + TO_BIAS * size)[None, :], 0.0)
            if target_sums.second:
                sum_margin += tl.where(is_target, tl.load(own_ptr + TO_MARGIN * size)[None, :], 0.0)
    sum_bias, sum_margin = tl.sum(sum_bias, 1), tl.sum(sum_margin, 1)
    store_sums(target_sums, sum_bias, sum_margin, split, column, classes, column < classes)


@triton.jit
def add_sums(sums, kind, splits, column, classes):
    """Return the first (0) or second (sums.first) of the sums, the splits added up in order."""
    kinds: tl.constexpr = sums.first + sums.second
    total = tl.zeros(column.shape, tl.float32)
    for split in range(splits):
        offset = (split * kinds + kind) * tl.cast(classes, tl.int64)
        total += tl.load(sums.ptr + offset + column, mask=column < classes)
    return total


@triton.jit(do_not_specialize=["splits", "target_splits"])
def linear_margin_cross_entropy_class_sums_kernel(
    sums,  # ColumnSums, see linear_margin_cross_entropy_grad_factor_kernel
    target_sums,  # ColumnSums, see linear_margin_cross_entropy_target_sums_kernel
    v,  # ClassVectors
    o,  # KernelOptions
    grads,  # ClassGradients
    classes,
    splits,
    target_splits,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of the class vectors from the sums of all splits."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = column < classes
    scale = load_scale(o.scale, o.learned_scale_ptr)
    class_scale = 1.0
    if o.class_scale_ptr is not None:
        class_scale = tl.load(o.class_scale_ptr + column, mask=real)
    if sums.first:
        through = add_sums(sums, 0, splits, column, classes)
    if grads.linear_bias_ptr is not None:
        grad = scale * class_scale * through
        tl.store(grads.linear_bias_ptr + column, grad.to(grads.linear_bias_ptr.dtype.element_ty), mask=real)
    if grads.class_bias_ptr is not None:
        grad = through
        if target_sums.first:
            grad += add_sums(target_sums, 0, target_splits, column, classes)
        tl.store(grads.class_bias_ptr + column, grad, mask=real)
    if sums.second:
        product = add_sums(sums, sums.first, splits, column, classes)
        if v.inverse_norm_ptr is not None:
            product = product * tl.load(v.inverse_norm_ptr + column, mask=real)
        if v.linear_bias_ptr is not None:
            product += through * tl.load(v.linear_bias_ptr + column, mask=real).to(tl.float32)
        if grads.class_scale_ptr is not None:
            tl.store(grads.class_scale_ptr + column, scale * product, mask=real)
        if grads.scale_ptr is not None:
            tl.store(grads.scale_ptr + column, class_scale * product, mask=real)
    if target_sums.second:
        grad = add_sums(target_sums, target_sums.first, target_splits, column, classes)
        tl.store(grads.class_margin_ptr + column, scale * grad, mask=real)


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
        padded = triton.cdiv(n, PADDING) * PADDING
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
        rows = block_of_rows(a.input.shape[1])
        launch_with(linear_margin_cross_entropy_terms_kernel, (triton.cdiv(padded, rows["BLOCK"]),), arguments, **rows)
        if needs[0]:
            grads[0] = left_gradient(
                linear_margin_cross_entropy_grad_input_kernel, arguments, launches.grad_input, a.input, classes,
                a.input.dtype,
            )  # fmt: skip
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
    sums = target_sums = column_sums(0, False, False, classes, rest)
    if need_weight or through or product:
        grads[1], sums = right_gradient(
            linear_margin_cross_entropy_grad_factor_kernel, arguments, launch, a.factor, n,
            a.linear_weight.dtype if need_weight else None, through, product,
        )  # fmt: skip
    if extra or need_margin:
        block_n, block_c = _TARGET_SUMS
        cut = gemm.cut(triton.cdiv(classes, block_c), triton.cdiv(n, block_n), 8)
        target_sums = column_sums(cut.splits, extra, need_margin, classes, rest)
        own = {"target_sums": target_sums, "blocks_per_split": cut.per_split}
        constants = {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4}
        launch_with(linear_margin_cross_entropy_target_sums_kernel, cut.grid, arguments | own, **constants)
    if through or product or need_margin:
        outputs = []
        for name, position in {"linear_bias": 2, "class_bias": 4, "class_scale": 5, "class_margin": 6}.items():
            if needs[position]:
                like: Any = a.linear_bias if name == "linear_bias" else getattr(a.options, name)
                grads[position] = like.new_empty((classes,))
            outputs.append(grads[position] if needs[position] else None)
        to_scale = rest.new_empty((classes,)) if need_learned else None
        own = {"sums": sums, "target_sums": target_sums, "grads": ClassGradients(*outputs, scale_ptr=to_scale)}
        for name, of in (("splits", sums), ("target_splits", target_sums)):
            own[name] = 0 if of.ptr is None else len(of.ptr)
        launch_with(
            linear_margin_cross_entropy_class_sums_kernel, (triton.cdiv(classes, 256),), arguments | own, BLOCK=256,
            num_warps=4,
        )  # fmt: skip
        if to_scale is not None:
            grads[7] = a.options.scale * (to_scale.sum() + arguments["terms_ptr"][TO_SCALE.value].sum())
