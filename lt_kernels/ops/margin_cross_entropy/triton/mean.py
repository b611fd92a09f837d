"""Small kernels: the coefficient of a mean, weights of rows, and a gradient times the upstream one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._device import MULTIPROCESSORS

#: Targets that one program of a mean's coefficient counts, at most.
_COUNTED = 8192
#: Programs that scale a gradient, at most.
_SCALING = 2 * MULTIPROCESSORS


@triton.jit(do_not_specialize=["rows", "ignore_index", "factor"])
def margin_cross_entropy_mean_coefficient_kernel(
    target_ptr,  # [rows] integers
    mixed_target_ptr,  # [rows] integers
    weight_ptr,  # [C]
    partial_ptr,  # [1 or 2, parts] float32, int32 without weights: total of each part
    coefficient_ptr,  # [1 or 2], written where there is no partial_ptr
    rows,
    classes,
    ignore_index,
    factor,
    BLOCK: tl.constexpr,
):
    """Sum the weights of the targets that are not ignored, or divide by the sum; programs (part, which target)."""
    which = tl.program_id(1)
    if mixed_target_ptr is not None:
        if which == 1:
            target_ptr = mixed_target_ptr
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(target_ptr + row, mask=inside, other=0).to(tl.int64)
    valid = inside & (target != ignore_index)
    if weight_ptr is not None:
        column = tl.minimum(tl.maximum(target, 0), classes - 1)
        total = tl.sum(tl.load(weight_ptr + column, mask=valid, other=0.0), 0)
    else:
        total = tl.sum(valid.to(tl.int32), 0)
    if partial_ptr is not None:
        tl.store(partial_ptr + which * tl.num_programs(0) + tl.program_id(0), total)
    else:
        tl.store(coefficient_ptr + which, tl.div_rn(factor, total.to(tl.float32)))


@triton.jit(do_not_specialize=["parts", "factor"])
def margin_cross_entropy_reciprocal_sum_kernel(
    partial_ptr,  # [1 or 2, parts]
    coefficient_ptr,  # [1 or 2]
    parts,
    factor,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute factor / sum of the parts; counts are added up exactly."""
    which = tl.program_id(0)
    totals = tl.zeros([BLOCK], tl.float32 if WEIGHTED else tl.int64)
    for begin in range(0, parts, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        totals += tl.load(partial_ptr + which * parts + part, mask=part < parts, other=0).to(totals.dtype)
    tl.store(coefficient_ptr + which, tl.div_rn(factor, tl.sum(totals, 0).to(tl.float32)))


@triton.jit
def count_rows(target_ptr, rows, ignore_index, BLOCK: tl.constexpr):
    """Return how many targets are not ignored, at least 1."""
    counts = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < rows
        target = tl.load(target_ptr + row, mask=inside, other=0).to(tl.int64)
        counts += (inside & (target != ignore_index)).to(tl.int32)
    return tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "ignore_index", "factor"])
def margin_cross_entropy_row_weights_kernel(
    target_ptr,  # [rows] integers
    mixed_target_ptr,  # [rows] integers
    mix_lambda_ptr,  # 0-dim or [rows]
    weight_ptr,  # [rows]
    rows,
    mix_lambda_stride,
    ignore_index,
    factor,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write factor times each target's share where it is not ignored, over the number of such rows if MEAN."""
    factor_b = factor
    if MEAN:
        if mixed_target_ptr is not None:
            factor_b = tl.div_rn(factor, count_rows(mixed_target_ptr, rows, ignore_index, BLOCK))
        factor = tl.div_rn(factor, count_rows(target_ptr, rows, ignore_index, BLOCK))
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    weight = tl.where(tl.load(target_ptr + row, mask=inside, other=0).to(tl.int64) != ignore_index, factor, 0.0)
    if mixed_target_ptr is not None:
        share = tl.load(mix_lambda_ptr + row * mix_lambda_stride, mask=inside, other=0.0)
        kept = tl.load(mixed_target_ptr + row, mask=inside, other=0).to(tl.int64) != ignore_index
        weight = share * weight + (1.0 - share) * tl.where(kept, factor_b, 0.0)
    tl.store(weight_ptr + row, weight, mask=inside)


@triton.jit
def margin_cross_entropy_scale_kernel(
    grad_ptr,  # [elements]
    factor_ptr,  # 0-dim
    elements,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for block in range(tl.program_id(0), (elements + (BLOCK - 1)) // BLOCK, tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            pointers, mask = grad_ptr + offsets, offsets < elements
            values = tl.load(pointers, mask=mask).to(tl.float32)
            tl.store(pointers, (values * factor).to(grad_ptr.dtype.element_ty), mask=mask)


def scale_gradient_(grad: Tensor, factor: Tensor) -> None:
    """Multiply any dense ``grad`` by the factor (0-dim, on the device), without touching memory if it is 1.

    Few programs, so that they are gone soon if it is 1, each with enough in flight to keep the memory busy.
    """
    elements, block = grad.numel(), 8192
    with torch.cuda.device_of(grad):
        if elements > 0:
            programs = min(triton.cdiv(elements, block), _SCALING)
            margin_cross_entropy_scale_kernel[(programs,)](grad, factor, elements, BLOCK=block, num_warps=8)


def mean_coefficient(
    target: Tensor,
    mixed_target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
) -> Tensor:
    """Return factor / total weight of the targets that are not ignored, [1], or [2] with ``mixed_target``; inf for 0.

    One launch up to 8192 targets, else two. Targets out of range count as the nearest class.
    """
    targets = [target.contiguous()] + ([] if mixed_target is None else [mixed_target.contiguous()])
    rows = target.numel()
    coefficient = target.new_empty((len(targets),), dtype=dtype)
    block = min(max(triton.next_power_of_2(rows), 128), _COUNTED)
    parts = max(triton.cdiv(rows, block), 1)
    partial = None
    if parts > 1:
        partial = target.new_empty((len(targets), parts), dtype=torch.int32 if weight is None else torch.float32)
    with torch.cuda.device_of(target):
        margin_cross_entropy_mean_coefficient_kernel[(parts, len(targets))](
            targets[0], None if mixed_target is None else targets[1], weight, partial, coefficient, rows, classes,
            ignore_index, factor, BLOCK=block, num_warps=max(block // 256, 1),
        )  # fmt: skip
        if partial is not None:
            block = min(triton.next_power_of_2(parts), 1024)
            margin_cross_entropy_reciprocal_sum_kernel[(len(targets),)](
                partial,
                coefficient,
                parts,
                factor,
                WEIGHTED=weight is not None,
                BLOCK=block,
                num_warps=max(block // 256, 1),
            )
    return coefficient


def row_weights(
    target: Tensor, mixed_target: Tensor | None, mix_lambda: Tensor | None, ignore_index: int, mean: bool, factor: float
) -> Tensor:
    """Return what the terms of rows are multiplied by, [N]: see ``op.py``. Every program counts all targets."""
    rows = target.numel()
    weight = target.new_empty((rows,), dtype=torch.float32)
    if rows > 0:
        block = min(max(triton.next_power_of_2(rows), 128), 2048)
        with torch.cuda.device_of(target):
            margin_cross_entropy_row_weights_kernel[(triton.cdiv(rows, block),)](
                target.contiguous(), None if mixed_target is None else mixed_target.contiguous(), mix_lambda, weight,
                rows, 0 if mix_lambda is None or mix_lambda.dim() == 0 else 1, ignore_index, factor, MEAN=mean,
                BLOCK=block, num_warps=max(block // 256, 1),
            )  # fmt: skip
    return weight
