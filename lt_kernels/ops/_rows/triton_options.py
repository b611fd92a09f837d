"""A row's options as the Triton kernels take them: one NamedTuple of pointers and numbers, and its derivation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .options import RowOptions


class KernelOptions(NamedTuple):
    """One argument of a kernel. A pointer is None where the option is absent; the compiler then drops its code.

    Class vectors are [C] float32. ``ignore_index`` is an argument of its own: no kernel is compiled for its value.
    """

    target_ptr: Any = None  # [N, K] int64, or [N, C, K] probabilities where soft
    mixed_target_ptr: Any = None  # [N, K] int64
    mix_lambda_ptr: Any = None  # 0-dim or [N, K]
    weight_ptr: Any = None  # [C]
    smoothing_ptr: Any = None  # [C], the smoothing of each class, where some may be masked
    smooth_weight_ptr: Any = None  # [C], that, or weight_ptr
    smooth_total_ptr: Any = None  # 0-dim, its sum
    class_bias_ptr: Any = None  # [C]
    class_scale_ptr: Any = None  # [C]
    margin_ptr: Any = None  # [C], or [3, C] where angular: margin, cosine, sine
    learned_scale_ptr: Any = None  # 0-dim
    coefficient_ptr: Any = None  # [1 or 2]
    mix_lambda_stride: Any = 0  # 0 for one share of all rows
    scale: Any = 1.0
    margin: Any = 0.0
    cos_margin: Any = 1.0
    sin_margin: Any = 0.0
    label_smoothing: Any = 0.0
    scaled: Any = False  # constexpr, like those below: whether logits have a scale other than 1
    angular: Any = False
    smooth: Any = False
    soft: Any = False
    masks: Any = False  # whether classes of no weight may have logits of -inf


def kernel_options(o: RowOptions) -> KernelOptions:
    """Return what the kernels read of the options."""
    margin, share = o.class_margin, o.mix_lambda
    if margin is not None:
        margin = margin if o.margin == 0.0 else margin + o.margin
        if o.angular:
            margin = torch.stack([margin, margin.cos(), margin.sin()])
    smooth = o.label_smoothing > 0
    smooth_weight = o.weight if o.smooth_weight is None else o.smooth_weight
    return KernelOptions(
        target_ptr=o.target if o.soft else o.target.contiguous(),
        mixed_target_ptr=None if o.mixed_target is None else o.mixed_target.contiguous(),
        mix_lambda_ptr=None if share is None else share.contiguous(),
        weight_ptr=o.weight,
        smoothing_ptr=o.smooth_weight,
        smooth_weight_ptr=smooth_weight,
        smooth_total_ptr=smooth_weight.sum() if smooth and smooth_weight is not None and not o.soft else None,
        class_bias_ptr=o.class_bias,
        class_scale_ptr=o.class_scale,
        margin_ptr=margin,
        learned_scale_ptr=o.learned_scale,
        coefficient_ptr=o.coefficient,
        mix_lambda_stride=0 if share is None or share.dim() == 0 else 1,
        scale=o.scale,
        margin=o.margin,
        cos_margin=math.cos(o.margin),
        sin_margin=math.sin(o.margin),
        label_smoothing=o.label_smoothing,
        scaled=tl.constexpr(o.learned_scale is not None or o.scale != 1.0),
        angular=tl.constexpr(o.angular),
        smooth=tl.constexpr(smooth),
        soft=tl.constexpr(o.soft),
        masks=tl.constexpr(o.masks),
    )


@triton.jit
def plain_options(o, coefficient_ptr):
    """Return the options of the plain cross-entropy of the same targets."""
    return KernelOptions(
        target_ptr=o.target_ptr,
        mixed_target_ptr=o.mixed_target_ptr,
        mix_lambda_ptr=o.mix_lambda_ptr,
        mix_lambda_stride=o.mix_lambda_stride,
        coefficient_ptr=coefficient_ptr,
    )


def per_row(upstream: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int]:
    """Return an upstream gradient in float32 and the step between its rows: 0 for one value of all rows."""
    if upstream is None:
        return None, 0
    upstream = upstream.to(torch.float32)
    if all(stride == 0 for stride in upstream.stride()):
        return upstream, 0
    return upstream.expand(shape).contiguous(), 1
