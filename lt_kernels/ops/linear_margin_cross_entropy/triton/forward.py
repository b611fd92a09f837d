"""Forward of the tiled strategy: each program visits the class tiles of one split for one block of rows, and a second
kernel merges the splits in order. 2 D operations per logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gemm.triton_tiles import inner_products, load_left, load_right, split_tiles
from ..._rows.triton_math import (
    INF,
    NO_COLUMN,
    affine,
    fast_exp,
    finite_reference,
    largest,
    load_label,
    load_scale,
    load_smooth_share,
    load_smooth_total,
    merge_best,
    rescale_sums,
    row_loss,
    same_number,
    start_sums,
    times_weight,
)
from ..._triton import launch_with
from ..arguments import Arguments
from .launch import block_of_rows
from .tiles import common_arguments, launches_for, load_class_vectors, load_targets


@triton.jit
def raw_logits(s, v, columns, classes):
    """Return the logits x; -inf where there is no class."""
    real = columns < classes
    if v.inverse_norm_ptr is not None:
        s = s * tl.load(v.inverse_norm_ptr + columns, mask=real, other=0.0)
    if v.linear_bias_ptr is not None:
        s = s + tl.load(v.linear_bias_ptr + columns, mask=real, other=0.0).to(tl.float32)
    return tl.where(real, s, -INF)


@triton.jit(do_not_specialize=["rows", "tiles_per_split", "ignore_index"])
def linear_margin_cross_entropy_forward_kernel(
    f,  # Factors: inputs and classes
    v,  # ClassVectors
    o,  # KernelOptions
    partial_ptr,  # [2, 4 or 5, splits, N]: maximum, mass; where SMOOTH weighted, visited; for predictions the best
    partial_column_ptr,  # [splits, N] int32: the first column of the best; None without predictions
    rows,
    classes,
    tiles_per_split,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum over the columns of one split that are no target of the row."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    x = load_left(f, row, rows)
    row = tl.minimum(row, rows - 1).to(tl.int64)
    _, _, column_a = load_label(o.target_ptr + row, classes, ignore_index)
    if o.mixed_target_ptr is not None:
        _, _, column_b = load_label(o.mixed_target_ptr + row, classes, ignore_index)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    peak, mass, weighted, visited, best, best_column = start_sums(tl.zeros([BLOCK_N], tl.float32))
    lane = tl.arange(0, BLOCK_C)
    split, first, end = split_tiles(tiles_per_split, classes, BLOCK_C)
    for tile in range(first, end):
        begin = tile * BLOCK_C
        s = inner_products(x, load_right(f, begin + lane, classes), f)
        columns = (begin + lane)[None, :]
        slope, offset = load_class_vectors(v, scale, columns, classes)
        u = affine(s, slope, offset)
        is_target = lane[None, :] == (column_a - begin)[:, None]
        if o.mixed_target_ptr is not None:
            is_target = is_target | (lane[None, :] == (column_b - begin)[:, None])
        u = tl.where(is_target, -INF, u)
        before = peak
        peak = tl.maximum(peak, tl.max(u, 1))
        mass, weighted = rescale_sums(before, mass, weighted, visited, peak)
        z = u - finite_reference(peak)[:, None]
        mass += tl.sum(fast_exp(z), 1)
        if o.smooth:
            counted = (columns < classes) & ~is_target
            w_j = tl.full([1, BLOCK_C], 1.0, tl.float32)
            if o.smooth_weight_ptr is not None:
                w_j = tl.load(o.smooth_weight_ptr + columns, mask=columns < classes, other=0.0)
            weighted += tl.sum(tl.where(counted, times_weight(w_j, z, o), 0.0), 1)
            visited += tl.sum(tl.where(counted, w_j, 0.0), 1)
        if partial_column_ptr is not None:
            raw = raw_logits(s, v, columns, classes)
            tile_best = largest(raw, 1)
            tile_column = tl.min(tl.where(same_number(raw, tile_best[:, None]), columns, NO_COLUMN), 1)
            best, best_column = merge_best(best, best_column, tile_best, tile_column)
    size = tl.num_programs(1) * tl.cast(rows, tl.int64)
    out_ptr = partial_ptr + split * tl.cast(rows, tl.int64) + row
    tl.store(out_ptr, peak, mask=inside)
    tl.store(out_ptr + size, mass, mask=inside)
    if o.smooth:
        tl.store(out_ptr + 2 * size, weighted, mask=inside)
        tl.store(out_ptr + 3 * size, visited, mask=inside)
    if partial_column_ptr is not None:
        tl.store(out_ptr + (4 if o.smooth else 2) * size, best, mask=inside)
        tl.store(partial_column_ptr + split * tl.cast(rows, tl.int64) + row, best_column, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits", "ignore_index"])
def linear_margin_cross_entropy_finish_kernel(
    f,  # Factors: inputs and classes
    v,  # ClassVectors
    o,  # KernelOptions
    partial_ptr,  # [2, 3, 4 or 5, splits, N], see linear_margin_cross_entropy_forward_kernel
    partial_column_ptr,  # [splits, N] int32
    loss_ptr,  # [N]
    lse_ptr,  # [N]
    prediction_ptr,  # [N] int64
    rest_ptr,  # [2, N]
    rows,
    classes,
    splits,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Merge the splits in order and compute the rows' results."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    size = splits * tl.cast(rows, tl.int64)
    peak, mass, weighted, visited, best, best_column = start_sums(tl.zeros([BLOCK], tl.float32))
    for split in range(splits):
        from_ptr = partial_ptr + split * tl.cast(rows, tl.int64) + row
        split_peak = tl.load(from_ptr)
        split_mass = tl.load(from_ptr + size)
        split_weighted, split_visited = tl.zeros_like(mass), tl.zeros_like(mass)
        if o.smooth:
            split_weighted, split_visited = tl.load(from_ptr + 2 * size), tl.load(from_ptr + 3 * size)
        before = peak
        peak = tl.maximum(peak, split_peak)
        mass, weighted = rescale_sums(before, mass, weighted, visited, peak)
        split_mass, split_weighted = rescale_sums(split_peak, split_mass, split_weighted, split_visited, peak)
        mass += split_mass
        weighted += split_weighted
        visited += split_visited
        if prediction_ptr is not None:
            split_best = tl.load(from_ptr + (4 if o.smooth else 2) * size)
            split_column = tl.load(partial_column_ptr + split * tl.cast(rows, tl.int64) + row)
            best, best_column = merge_best(best, best_column, split_best, split_column)
    peak = finite_reference(peak)
    a, _, b, _ = load_targets(f, v, o, row, rows, classes, ignore_index)
    loss, lse = row_loss(peak, mass, weighted, a, b, load_smooth_total(o, classes), load_smooth_share(o, classes), o)
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(rest_ptr + row, peak, mask=inside)
    tl.store(rest_ptr + rows + row, mass, mask=inside)
    if prediction_ptr is not None:
        tl.store(prediction_ptr + row, best_column.to(tl.int64), mask=inside)


def forward(a: Arguments, inverse_norm: Tensor | None, with_prediction: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, log-sum-exp and prediction [N, 1], and rest [2, N, 1]. inverse_norm: [C] float32."""
    n, classes = a.input.shape[0], a.classes
    loss, lse = (a.input.new_empty((n, 1), dtype=torch.float32) for _ in range(2))
    rest = loss.new_empty((2, n, 1))
    prediction = loss.new_empty((n, 1) if with_prediction else (0,), dtype=torch.int64)
    if n == 0:
        return loss, lse, prediction, rest
    with torch.cuda.device_of(a.input):
        arguments = common_arguments(a, inverse_norm)
        launch = launches_for(a, arguments, with_prediction).forward
        cut = launch.along_rows(n, classes)
        kinds = (4 if a.options.label_smoothing > 0 else 2) + with_prediction
        arguments |= {
            "partial_ptr": loss.new_empty((kinds, cut.splits, n)),
            "partial_column_ptr": loss.new_empty((cut.splits, n), dtype=torch.int32) if with_prediction else None,
            "tiles_per_split": cut.per_split,
            "splits": cut.splits,
            "loss_ptr": loss,
            "lse_ptr": lse,
            "prediction_ptr": prediction if with_prediction else None,
            "rest_ptr": rest,
        }
        launch_with(linear_margin_cross_entropy_forward_kernel, cut.grid, arguments, **launch.constants)
        finish = block_of_rows(a.input.shape[1])
        launch_with(linear_margin_cross_entropy_finish_kernel, (triton.cdiv(n, finish["BLOCK"]),), arguments, **finish)
    return loss, lse, prediction, rest
