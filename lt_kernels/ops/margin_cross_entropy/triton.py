"""The rows kernel in Triton. The formulas are those of ``reference.py``; only how the columns are visited differs.

With ``peak`` and ``total`` the maximum and the sum of exp(u - peak) over the columns that are no target of the row
(together: ``rest`` [2, N, K], what backward needs beside the inputs), every other quantity of a row is scalar arithmetic
on the targets' own logits, and the gradient of an ordinary column is

    d loss / d x_j = a_j (slope * exp(u_j - peak) - smooth * w_j)            a_j = scale * class_scale_j

Layouts. *Rows*: the classes of a row are contiguous; one program per row. *Tiles*: anything else with a contiguous
position axis (segmentation, transposed logits), and rows of few classes; [BLOCK_C, BLOCK_K] tiles, one program per
BLOCK_K rows.

Groups. A row of 8142 bf16 logits starts on a 4-byte boundary, so 16-byte accesses must ignore where rows begin: the body
of a row is cut into GROUP aligned columns (16 bytes), and each group is read and written whole or not at all. What is
irregular -- the head before the first whole group, the tail after the last, the groups that hold a target -- is left out
of the body by one comparison per group and done in a tile of 4 * GROUP *edge* columns beside it. The body then needs no
comparison per column, no element of a neighbouring row is ever touched, and the target's column is never part of a sum.

Bytes per logit (b = itemsize), class vectors and rows' scalars aside: forward b; forward with gradient 2b (a row kept in
registers up to 32,768 classes, read again through L2 beyond); backward 2b. Exponentials are natural, exp(u - peak):
folding log2(e) into u would round u, 30 roundings of a probability at scale 64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Arguments

_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_NO_COLUMN = tl.constexpr(2**31 - 1)
_SIN2_MIN = tl.constexpr(1e-7)  # as in reference.py


# ---------------------------------------------------------------------------------------------------------------------
# Scalar arithmetic of one row (or of a vector of rows)


@triton.jit
def _logaddexp(a, b):
    high = tl.maximum(a, b)
    z = tl.exp(tl.minimum(a, b) - high)
    w = 1.0 + z  # log1p(z) = log(w) z / (w - 1): the rounding of w cancels
    log1p = tl.where(w == 1.0, z, tl.log(w) * (z / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where((high == -_INF) | (high == _INF), high, high + log1p)


@triton.jit
def _learned(scale, learned_scale_ptr):
    if learned_scale_ptr is not None:
        scale = scale * tl.load(learned_scale_ptr)
    return scale


@triton.jit
def _slot(
    row_ptr,  # first logit of the row
    target_ptr,  # this row's entry
    share,  # lambda | 1 - lambda
    coefficient_ptr,  # this target's entry
    weight_ptr,
    class_bias_ptr,
    class_scale_ptr,
    margin_ptr,
    classes,
    class_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    ANGULAR: tl.constexpr,
):
    """One target of a row; a class out of range makes its logit, and all that follows from it, NaN."""
    target = tl.load(target_ptr)
    valid = target != ignore_index
    known = valid & (target >= 0) & (target < classes)
    column = tl.where(known, target, -1).to(tl.int32)
    index = tl.where(known, target, 0)
    x = tl.load(row_ptr + index * class_stride).to(tl.float32)
    x = tl.where(valid & (column < 0), _NAN, x)
    factor = share
    if coefficient_ptr is not None:
        factor = share * tl.load(coefficient_ptr)
    weight = x * 0 + 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + index)
    class_scale = tl.full([], 1.0, tl.float32)
    if class_scale_ptr is not None:
        class_scale = tl.load(class_scale_ptr + index)
    bias = tl.full([], 0.0, tl.float32)
    if class_bias_ptr is not None:
        bias = tl.load(class_bias_ptr + index)
    if margin_ptr is not None:
        margin = tl.load(margin_ptr + index)
        if ANGULAR:
            cos_margin = tl.load(margin_ptr + classes + index)
            sin_margin = tl.load(margin_ptr + 2 * classes + index)
    cosine = class_scale * x
    if ANGULAR:
        sin2 = 1.0 - cosine * cosine
        sine = tl.sqrt_rn(tl.maximum(sin2, 0.0))
        beyond = cosine < -cos_margin  # theta > pi - m
        phi = tl.where(beyond, cosine - margin * sin_margin, cosine * cos_margin - sine * sin_margin)
        cotangent = cosine / tl.sqrt_rn(tl.maximum(sin2, _SIN2_MIN))
        dphi_dc = tl.where(beyond, 1.0, cos_margin + cotangent * sin_margin)
        dphi_dm = tl.where(
            beyond, -(sin_margin + margin * cos_margin), -(sine * cos_margin + cosine * sin_margin)
        )
    else:
        phi = cosine - margin
        dphi_dc = tl.full([], 1.0, tl.float32)
        dphi_dm = tl.full([], -1.0, tl.float32)
    plain = (scale * class_scale) * x + bias
    shifted = scale * phi + bias
    return column, valid, factor, weight, plain, shifted, phi, dphi_dc, dphi_dm
