"""Pieces that forward and backward of the tiled strategy share: folded class vectors, tiles, and the rows' targets.

With s_ij = <input_i, factor_j> from the dot's float32 accumulator, the logits and the shifted logits are

    x_ij = inverse_norm_j s_ij + linear_bias_j
    u_ij = slope_j s_ij + offset_j        slope_j  = scale * class_scale_j * inverse_norm_j
                                          offset_j = scale * class_scale_j * linear_bias_j + class_bias_j

so a tile costs one multiply-add per logit whatever the class vectors are. The targets' own logits are computed apart,
row by row. No logit is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gemm.launch import architecture_of, factors
from ..._gemm.triton_tiles import load_left, load_right
from ..._rows.triton_math import INF, load_label, load_scale, make_slot
from ..._rows.triton_options import kernel_options
from ..arguments import Arguments
from .launch import Launches, launches_of


class ClassVectors(NamedTuple):
    """What turns products into logits, one argument of a kernel: pointers to [C]."""

    inverse_norm_ptr: Any
    linear_bias_ptr: Any  # any floating dtype
    slope_ptr: Any  # the full scale if None
    offset_ptr: Any  # 0 if None
    has_slope: Any  # constexpr: whether any slope is not 1


@triton.jit
def load_class_vectors(v, scale, columns, classes):
    """Return slope and offset of the columns; offset is -inf, and with it every logit, where there is no class."""
    real = columns < classes
    if v.slope_ptr is not None:
        slope = tl.load(v.slope_ptr + columns, mask=real, other=0.0)
    else:
        slope = scale
    if v.offset_ptr is not None:
        offset = tl.load(v.offset_ptr + columns, mask=real, other=-INF)
    else:
        offset = tl.where(real, 0.0, -INF)
    return slope, offset


@triton.jit
def load_target(x, target_ptr, share, f, v, o, scale, classes, ignore_index, SLOT: tl.constexpr):
    """Return a target of the rows with vectors x, float32, and its class_scale_y x_y.

    That is not NaN for a class out of range.
    """
    label = load_label(target_ptr, classes, ignore_index)
    index = label.index
    logit = tl.sum(x * load_right(f, index, classes).to(tl.float32), 1)
    if v.inverse_norm_ptr is not None:
        logit = logit * tl.load(v.inverse_norm_ptr + index)
    if v.linear_bias_ptr is not None:
        logit = logit + tl.load(v.linear_bias_ptr + index).to(tl.float32)
    slot = make_slot(logit, label, share, o, scale, classes, SLOT)
    if o.class_scale_ptr is not None:
        logit = logit * tl.load(o.class_scale_ptr + index)
    return slot, logit


@triton.jit
def load_targets(f, v, o, row, rows, classes, ignore_index):
    """Return both targets of the rows, each with its class_scale_y x_y; the second repeats the first if it is alone."""
    scale = load_scale(o.scale, o.learned_scale_ptr)
    x = load_left(f, row, rows).to(tl.float32)
    share = 1.0
    if o.mixed_target_ptr is not None:
        share = tl.load(o.mix_lambda_ptr + row * o.mix_lambda_stride)
    a, cosine_a = load_target(x, o.target_ptr + row, share, f, v, o, scale, classes, ignore_index, 0)
    b, cosine_b = a, cosine_a
    if o.mixed_target_ptr is not None:
        target_ptr = o.mixed_target_ptr + row
        b, cosine_b = load_target(x, target_ptr, 1.0 - share, f, v, o, scale, classes, ignore_index, 1)
    return a, cosine_a, b, cosine_b


@triton.jit
def linear_margin_cross_entropy_fold_kernel(
    o,  # KernelOptions
    inverse_norm_ptr,  # [C]
    linear_bias_ptr,  # [C], any floating dtype
    slope_ptr,  # [C]
    offset_ptr,  # [C]
    classes,
    BLOCK: tl.constexpr,
):
    """Compute slope and offset, each where its pointer is given."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = column < classes
    slope = tl.zeros([BLOCK], tl.float32) + load_scale(o.scale, o.learned_scale_ptr)
    if o.class_scale_ptr is not None:
        slope = slope * tl.load(o.class_scale_ptr + column, mask=real, other=0.0)
    if offset_ptr is not None:
        offset = slope * tl.load(linear_bias_ptr + column, mask=real, other=0.0).to(tl.float32)
        if o.class_bias_ptr is not None:
            offset += tl.load(o.class_bias_ptr + column, mask=real, other=0.0)
        tl.store(offset_ptr + column, offset, mask=real)
    if slope_ptr is not None:
        if inverse_norm_ptr is not None:
            slope = slope * tl.load(inverse_norm_ptr + column, mask=real, other=0.0)
        tl.store(slope_ptr + column, slope, mask=real)


def common_arguments(a: Arguments, inverse_norm: Tensor | None) -> dict[str, Any]:
    """Return the arguments of the kernels, by name; each takes some."""
    classes = a.classes
    options = kernel_options(a.options)
    norm = None if inverse_norm is None else inverse_norm.contiguous()
    bias = None if a.linear_bias is None else a.linear_bias.contiguous()
    slope, offset = None, a.options.class_bias
    if norm is not None or a.options.class_scale is not None:
        slope = a.input.new_empty((classes,), dtype=torch.float32)
    if bias is not None:
        offset = a.input.new_empty((classes,), dtype=torch.float32)
    if slope is not None or bias is not None:
        linear_margin_cross_entropy_fold_kernel[(triton.cdiv(classes, 1024),)](
            options, norm, bias, slope, None if bias is None else offset, classes, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return {
        "f": factors(a.input, a.factor),
        "v": ClassVectors(norm, bias, slope, offset, tl.constexpr(options.scaled.value or slope is not None)),
        "o": options,
        "rows": a.input.shape[0],
        "classes": classes,
        "ignore_index": a.options.ignore_index,
    }


def launches_for(a: Arguments, arguments: dict[str, Any], with_prediction: bool = False) -> Launches:
    """Return the launches of a call with these arguments."""
    options = with_prediction + (a.options.label_smoothing > 0) + (a.options.mixed_target is not None)
    f = arguments["f"]
    tf32 = f.precision.value == "tf32"
    return launches_of(f.width, a.input.element_size(), tf32, options, architecture_of(a.input.device))
