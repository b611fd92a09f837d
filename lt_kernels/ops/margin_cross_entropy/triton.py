"""The rows kernel in Triton. The formulas are those of ``reference.py``; only how the columns are visited differs.

With ``peak`` and ``mass`` the maximum and the sum of exp(u - peak) over the columns that are no target of the row
(together: ``rest`` [2, N, K], what backward needs beside the inputs), every other quantity of a row is scalar
arithmetic on the targets' own logits, and the gradient of an ordinary column is

    d loss / d x_j = a_j (slope * exp(u_j - peak) - smooth * w_j)            a_j = scale * class_scale_j

Layouts. *Rows*: the classes of a row are contiguous; one program per row. *Tiles*: any other layout (segmentation,
transposed logits), and rows of few classes; one program per BLOCK_K rows, visited in [BLOCK_C, BLOCK_K] tiles.

Groups. A row of 8142 bf16 logits starts on a 4-byte boundary, so 16-byte accesses must ignore where rows begin: the
body of a row is cut into aligned groups of GROUP columns (16 bytes), each read and written whole or not at all. What is
irregular -- the head before the first whole group, the tail after the last, the groups that hold a target -- is left
out of the body by one comparison per group, and done in a tile of 4 * GROUP *edge* columns. So the body needs no
comparison per column, no element of a neighbouring row is ever touched, and no target's column is part of a sum.

Bytes per logit (b = itemsize), beside class vectors and rows' scalars: forward b; forward with gradient 2b (the row
stays in registers up to 32,768 classes; beyond, its second read should hit L2); backward 2b. Exponentials are natural,
exp(u - peak): folding log2(e) into u would round u, which costs 30 roundings of a probability at scale 64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .._triton import interpreting
from .arguments import DIFFERENTIABLE, Arguments

_INTERPRETED = tl.constexpr(interpreting())

_INF = tl.constexpr(float("inf"))
_NO_COLUMN = tl.constexpr(2**31 - 1)
_SIN2_MIN = tl.constexpr(1e-7)  # as in reference.py


# --- one row's scalars (or a vector of rows') ------------------------------------------------------------------------


@triton.jit
def _exp(x):
    if _INTERPRETED:
        return tl.exp(x)
    else:  # the same, but results below 1e-38 become 0: tl.exp spends 3 more instructions to keep them
        return libdevice.fast_expf(x)


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(x)) for x <= 0."""
    z = _exp(x)
    w = 1.0 + z  # log1p(z) = log(w) z / (w - 1): the rounding of w cancels
    return tl.where(w == 1.0, z, tl.log(w) * (z / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _logaddexp(a, b):
    high = tl.maximum(a, b)
    return tl.where(high == -_INF, high, high + _log1p_exp(tl.minimum(a, b) - high))


@triton.jit
def _full_scale(scale, learned_scale_ptr):
    if learned_scale_ptr is not None:
        scale = scale * tl.load(learned_scale_ptr)
    return scale


@triton.jit
def _weight_total(weight_total_ptr, classes):
    """Sum of the class weights."""
    if weight_total_ptr is not None:
        total = tl.load(weight_total_ptr)
    else:
        total = classes * tl.full([], 1.0, tl.float32)
    return total


@triton.jit
def _slot(
    row_ptr,  # the row's first logit
    target_ptr,  # the row's entry
    share,
    coefficient_ptr,  # [1 or 2]
    weight_ptr,  # [C]
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    classes,
    class_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    SLOT: tl.constexpr,
    ANGULAR: tl.constexpr,
):
    """One target of a row. Its column is -1 where there is none; a class out of range makes its logits NaN."""
    target = tl.load(target_ptr)
    valid = target != ignore_index
    known = valid & (target >= 0) & (target < classes)
    column = tl.where(known, target, -1).to(tl.int32)
    index = tl.where(known, target, 0)
    x = tl.load(row_ptr + index * class_stride).to(tl.float32)
    x = tl.where(valid & (column < 0), float("nan"), x)
    one = tl.full([], 1.0, tl.float32)
    factor, weight, class_scale, bias = share * one, one, one, one * 0.0
    if coefficient_ptr is not None:
        factor = share * tl.load(coefficient_ptr + SLOT)
    factor = tl.where(valid, factor, factor * 0.0)  # NaN where the mean is over no weight at all, as in torch
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + index)
    if class_scale_ptr is not None:
        class_scale = tl.load(class_scale_ptr + index)
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
        cotangent = cosine / tl.sqrt_rn(tl.maximum(sin2, _SIN2_MIN))
        beyond = cosine < -cos_margin  # theta > pi - m
        phi = tl.where(beyond, cosine - margin * sin_margin, cosine * cos_margin - sine * sin_margin)
        dphi_dc = tl.where(beyond, 1.0, cos_margin + cotangent * sin_margin)
        dphi_dm = -tl.where(beyond, sin_margin + margin * cos_margin, sine * cos_margin + cosine * sin_margin)
    else:
        phi = cosine - margin
        dphi_dc, dphi_dm = one, -one
    plain = (scale * class_scale) * x + bias
    shifted = scale * phi + bias
    return column, valid, factor, weight, plain, shifted, phi, dphi_dc, dphi_dm


@triton.jit
def _slots(
    row_ptr,
    row,
    target_ptr,  # [N, K] int64
    mixed_target_ptr,  # [N, K] int64
    mix_lambda_ptr,  # 0-dim or [N, K]
    coefficient_ptr,
    weight_ptr,
    class_bias_ptr,
    class_scale_ptr,
    margin_ptr,
    classes,
    class_stride,
    mix_lambda_stride,
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    ANGULAR: tl.constexpr,
):
    """Both targets of a row; the second repeats the first where there is only one."""
    share = 1.0
    if mixed_target_ptr is not None:
        share = tl.load(mix_lambda_ptr + row * mix_lambda_stride)
    a = _slot(
        row_ptr, target_ptr + row, share, coefficient_ptr, weight_ptr, class_bias_ptr, class_scale_ptr, margin_ptr,
        classes, class_stride, scale, margin, cos_margin, sin_margin, ignore_index, 0, ANGULAR,
    )  # fmt: skip
    b = a
    if mixed_target_ptr is not None:
        b = _slot(
            row_ptr, mixed_target_ptr + row, 1.0 - share, coefficient_ptr, weight_ptr, class_bias_ptr, class_scale_ptr,
            margin_ptr, classes, class_stride, scale, margin, cos_margin, sin_margin, ignore_index, 1, ANGULAR,
        )  # fmt: skip
    return a, b


@triton.jit
def _totals(peak, mass, own, other, MIXED: tl.constexpr):
    """Log-sum-exp over the columns other than the slot's own and over all, both minus the peak; their cross-entropy."""
    column, valid, _, _, _, shifted, _, _, _ = own
    others = tl.log(mass)
    if MIXED:
        other_column, other_valid, _, _, other_plain, _, _, _, _ = other
        separate = other_valid & (other_column != column)
        others = tl.where(separate, _logaddexp(others, other_plain - peak), others)
    excess = others - (shifted - peak)
    more = _log1p_exp(-tl.abs(excess))
    total = tl.maximum(others, shifted - peak) + more
    return others, tl.where(valid, total, others), tl.maximum(excess, 0.0) + more


@triton.jit
def _term(
    peak, mass, weighted, own, other, weight_total, label_smoothing, smooth_share, MIXED: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """The slot's term of the loss; ``weighted``: sum of w_j (u_j - peak) over the columns that are no target."""
    column, valid, factor, weight, _, shifted, _, _, _ = own
    _, total, cross_entropy = _totals(peak, mass, own, other, MIXED)
    term = weight * cross_entropy
    if SMOOTH:
        smooth = weight_total * total - weighted - weight * (shifted - peak)
        if MIXED:
            other_column, other_valid, _, other_weight, other_plain, _, _, _, _ = other
            separate = other_valid & (other_column != column)
            smooth -= tl.where(separate, other_weight * (other_plain - peak), 0.0)
        term = (1.0 - label_smoothing) * term + smooth_share * smooth
    return tl.where(valid, factor * term, factor)


@triton.jit
def _loss(
    peak, mass, weighted, a, b, weight_total, label_smoothing, smooth_share, MIXED: tl.constexpr, SMOOTH: tl.constexpr
):
    loss = _term(peak, mass, weighted, a, b, weight_total, label_smoothing, smooth_share, MIXED, SMOOTH)
    if MIXED:
        loss += _term(peak, mass, weighted, b, a, weight_total, label_smoothing, smooth_share, MIXED, SMOOTH)
    _, total, _ = _totals(peak, mass, a, b, MIXED)
    return loss, peak + total


@triton.jit
def _term_slopes(
    peak, mass, own, other, upstream, upstream_lse, weight_total, label_smoothing, smooth_share, MIXED: tl.constexpr
):
    """d/d(v), d/d(D), s and D - peak of one slot."""
    _, valid, factor, weight, _, shifted, _, _, _ = own
    others, total, _ = _totals(peak, mass, own, other, MIXED)
    factor = tl.where(valid, upstream * factor, 0.0)
    hard = factor * (1.0 - label_smoothing) * weight
    soft = factor * smooth_share
    wrong = _exp(others - total)  # 1 - p without cancellation
    right = _exp(shifted - peak - total)
    dv = soft * (weight_total * right - weight) + upstream_lse * right - hard * wrong
    return tl.where(valid, dv, 0.0), hard + soft * weight_total + upstream_lse, soft, total


@triton.jit
def _plain_gradient(peak, own, other, d_total, total, soft):
    """d/d(u_y) of the slot's column through the other slot's term."""
    column, _, _, weight, plain, _, _, _, _ = own
    other_column, other_valid, _, _, _, _, _, _, _ = other
    gradient = d_total * _exp(plain - peak - total) - soft * weight
    return tl.where(other_valid & (other_column == column), 0.0, gradient)


@triton.jit
def _slopes(peak, mass, a, b, upstream, upstream_lse, weight_total, label_smoothing, smooth_share, MIXED: tl.constexpr):
    """slope and smooth of the ordinary columns; of each slot d/d(u_y) and d/d(v)."""
    dv_a, d_total, smooth, total = _term_slopes(
        peak, mass, a, b, upstream, upstream_lse, weight_total, label_smoothing, smooth_share, MIXED
    )
    slope = d_total * _exp(-total)
    plain_a, plain_b, dv_b = tl.zeros_like(slope), tl.zeros_like(slope), tl.zeros_like(slope)
    if MIXED:
        dv_b, d_total_b, smooth_b, total_b = _term_slopes(
            peak, mass, b, a, upstream, 0.0, weight_total, label_smoothing, smooth_share, MIXED
        )
        plain_a = _plain_gradient(peak, a, b, d_total_b, total_b, smooth_b)
        plain_b = _plain_gradient(peak, b, a, d_total, total, smooth)
        slope += d_total_b * _exp(-total_b)
        smooth += smooth_b
    # without an ordinary column above -inf exp(-total) may overflow; NaN where nothing is finite
    slope = tl.where(mass == 0.0, d_total * (total - total), slope)
    return slope, smooth, plain_a, dv_a, plain_b, dv_b


# --- columns ---------------------------------------------------------------------------------------------------------


@triton.jit
def _class_values(ptr, first, offsets, mask, other, WIDE: tl.constexpr, AGAIN: tl.constexpr):
    """ptr[first + offsets] of a [C] float32 vector. WIDE: with the widest accesses that ``first`` allows. AGAIN: not
    for the first time; marked so that the compiler loads once more rather than keep a row of values in registers."""
    policy: tl.constexpr = "evict_last" if AGAIN else ""
    if WIDE:
        if first % 4 == 0:
            values = tl.load(ptr + first // 4 * 4 + offsets, mask=mask, other=other, eviction_policy=policy)
        elif first % 2 == 0:
            values = tl.load(ptr + first // 2 * 2 + offsets, mask=mask, other=other, eviction_policy=policy)
        else:
            values = tl.load(ptr + first + offsets, mask=mask, other=other, eviction_policy=policy)
    else:
        values = tl.load(ptr + first + offsets, mask=mask, other=other, eviction_policy=policy)
    return values


@triton.jit
def _shifted(
    x, first, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr
):
    """u = scale * class_scale * x + class_bias; -inf outside the mask, where x is -inf."""
    u = x
    if class_scale_ptr is not None:
        u = u * (scale * _class_values(class_scale_ptr, first, offsets, mask, 1.0, WIDE, False))
    elif HAS_SCALE:
        u = u * scale
    if class_bias_ptr is not None:
        u += _class_values(class_bias_ptr, first, offsets, mask, 0.0, WIDE, False)
    if HAS_SCALE or class_scale_ptr is not None:
        u = tl.where(mask, u, -_INF)  # -inf times what is not positive
    return u


@triton.jit
def _unscaled(gradient, first, offsets, mask, class_scale_ptr, scale, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr):
    """a_j times the gradient of u."""
    if class_scale_ptr is not None:
        gradient = gradient * (scale * _class_values(class_scale_ptr, first, offsets, mask, 1.0, WIDE, True))
    elif HAS_SCALE:
        gradient = gradient * scale
    return gradient


@triton.jit
def _soft_weights(
    q_ptr, q_offsets, first, offsets, mask, weight_ptr, label_smoothing, smooth_share, SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """w_j ((1 - smoothing) q_j + smoothing / C); 0 outside the mask."""
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0).to(tl.float32)
    if SMOOTH:
        q = tl.where(mask, (1.0 - label_smoothing) * q + smooth_share, 0.0)
    if weight_ptr is not None:
        q = q * _class_values(weight_ptr, first, offsets, mask, 0.0, WIDE, False)
    return q


@triton.jit
def _ordinary(
    e, slope, smooth, q, first, offsets, mask, weight_ptr, SMOOTH: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr
):
    """Gradient of u where no target is, from e = exp(u - peak); q: the soft weights where SOFT."""
    du = slope * e
    if SOFT:
        du -= smooth * q
    elif SMOOTH:
        if weight_ptr is not None:
            du -= smooth * _class_values(weight_ptr, first, offsets, mask, 0.0, WIDE, True)
        else:
            du -= smooth
    return du


@triton.jit
def _weighted(z, first, offsets, mask, weight_ptr, WIDE: tl.constexpr):
    """w_j z_j inside the mask, else 0."""
    if weight_ptr is not None:
        z = z * _class_values(weight_ptr, first, offsets, mask, 0.0, WIDE, False)
    return tl.where(mask, z, 0.0)


@triton.jit
def _at_targets(columns, du, a, b, plain_a, dv_a, plain_b, dv_b, MIXED: tl.constexpr):
    """du, but in the targets' columns d/d(u_y) plus what reaches class_scale_y x_y through v."""
    column, _, _, _, _, _, _, dphi_dc, _ = a
    du = tl.where(columns == column, plain_a, du)
    if MIXED:
        column_b, _, _, _, _, _, _, dphi_dc_b, _ = b
        du = tl.where(columns == column_b, plain_b, du)
        du += tl.where(columns == column_b, dv_b * dphi_dc_b, 0.0)
    return du + tl.where(columns == column, dv_a * dphi_dc, 0.0)


@triton.jit
def _positions(block, positions, BLOCK_K: tl.constexpr):
    """Sample, positions, which exist, and row numbers (those past the end repeat the last) of a block of rows."""
    blocks = (positions + (BLOCK_K - 1)) // BLOCK_K
    n = (block // blocks).to(tl.int64)
    k = (block % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    return n, k, k < positions, n * positions + tl.minimum(k, positions - 1)


@triton.jit
def _best(x, columns, mask):
    """Maximum of x along the classes and its first column; as in torch.argmax a NaN is larger than anything."""
    best = tl.max(tl.where(x == x, x, -_INF), 0)
    column = tl.min(tl.where(mask & (x == best), columns, _NO_COLUMN), 0)
    nan_column = tl.min(tl.where(x != x, columns, _NO_COLUMN), 0)
    has_nan = nan_column < _NO_COLUMN
    return tl.where(has_nan, float("nan"), best), tl.where(has_nan, nan_column, column)


@triton.jit
def _better(best, column, other, other_column):
    nan, other_nan = best != best, other != other
    as_good = (other == best) | (nan & other_nan)
    replace = (other > best) | (other_nan & ~nan) | (as_good & (other_column < column))
    replace = replace & (other_nan | ~nan)
    return tl.where(replace, other, best), tl.where(replace, other_column, column)


@triton.jit
def _groups(offset, classes, GROUP: tl.constexpr):
    """Of a row that starts at ``offset``: its first aligned element, the columns before it, and its whole groups."""
    aligned = (offset + (GROUP - 1)) // GROUP * GROUP
    head = tl.minimum((aligned - offset).to(tl.int32), classes)
    return aligned, head, (classes - head) // GROUP


@triton.jit
def _group_of(slot, head, groups, GROUP: tl.constexpr):
    """The whole group that holds the slot's column, -1 if none does."""
    column, _, _, _, _, _, _, _, _ = slot
    group = (column - head) // GROUP
    return tl.where((column >= head) & (group < groups), group, -1)


@triton.jit
def _edge(head, groups, group_a, group_b, classes, GROUP: tl.constexpr):
    """Columns outside the body, [4 * GROUP]: head, tail, the groups of the two targets; and which of them exist."""
    lane = tl.arange(0, 4 * GROUP)
    part = lane // GROUP
    tail = head + groups * GROUP
    first = tl.where(part == 0, 0, tail)
    stop = tl.where(part == 0, head, classes)
    group = tl.where(part == 2, group_a, group_b)
    first = tl.where(part >= 2, head + group * GROUP, first)
    stop = tl.where(part >= 2, tl.where(group >= 0, tail, first), stop)
    columns = first + lane % GROUP
    return columns, columns < stop


@triton.jit
def _body(offsets, groups, group_a, group_b, GROUP: tl.constexpr):
    """Which of the columns ``head + offsets`` are in the body."""
    group = offsets // GROUP
    return (group < groups) & (group != group_a) & (group != group_b)


# --- rows: forward ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index"])
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
    loss_ptr,  # [N, K]
    lse_ptr,  # [N, K]
    prediction_ptr,  # [N, K] int64
    rest_ptr,  # [2, N, K]
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
    BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    WIDE: tl.constexpr = GROUP >= 4
    MIXED: tl.constexpr = mixed_target_ptr is not None
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
        group_a = _group_of(a, head, groups, GROUP)
        if MIXED:
            group_b = _group_of(b, head, groups, GROUP)
            group_b = tl.where(group_b == group_a, -1, group_b)

    edge, edge_mask = _edge(head, groups, group_a, group_b, classes, GROUP)
    x_edge = tl.load(row_ptr + edge, mask=edge_mask, other=-_INF).to(tl.float32)
    u_edge = _shifted(x_edge, 0, edge, edge_mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
    rest_mask = edge_mask
    if not SOFT:
        column_a, _, _, _, _, _, _, _, _ = a
        rest_mask = rest_mask & (edge != column_a)
        if MIXED:
            column_b, _, _, _, _, _, _, _, _ = b
            rest_mask = rest_mask & (edge != column_b)
    peak = tl.max(tl.where(rest_mask, u_edge, -_INF), 0)
    if prediction_ptr is not None:
        best, prediction = _best(x_edge, edge, edge_mask)

    if ONE_TILE:
        offsets = tl.arange(0, BLOCK)
        mask = _body(offsets, groups, group_a, group_b, GROUP)
        x = tl.load(body_ptr + offsets, mask=mask, other=-_INF).to(tl.float32)
        u = _shifted(x, head, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, WIDE)
        peak = tl.maximum(peak, tl.max(u, 0))
        peak = tl.where(peak == -_INF, 0.0, peak)
        e = _exp(u - peak)
        mass = tl.sum(e, 0)
        weighted = 0.0
        visited = 0.0
        if SOFT:
            q = _soft_weights(
                q_body, offsets, head, offsets, mask, weight_ptr, label_smoothing, smooth_share, SMOOTH, WIDE
            )
            visited = tl.sum(q, 0)
            weighted = tl.sum(tl.where(mask, q * (u - peak), 0.0), 0)
        elif SMOOTH:
            weighted = tl.sum(_weighted(u - peak, head, offsets, mask, weight_ptr, WIDE), 0)
        if prediction_ptr is not None:
            tile_best, tile_column = _best(x, head + offsets, mask)
            best, prediction = _better(best, prediction, tile_best, tile_column)
    else:
        mass, weighted, visited = 0.0, 0.0, 0.0
        for begin in range(0, groups * GROUP, BLOCK):
            offsets = begin + tl.arange(0, BLOCK)
            mask = _body(offsets, groups, group_a, group_b, GROUP)
            x = tl.load(body_ptr + offsets, mask=mask, other=-_INF, eviction_policy="evict_last").to(tl.float32)
            u = _shifted(x, head, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, WIDE)
            # `peak` may be -inf, `reference` never is; sums so far are relative to the reference of the tile before
            before = tl.where(peak == -_INF, 0.0, peak)
            peak = tl.maximum(peak, tl.max(u, 0))
            reference = tl.where(peak == -_INF, 0.0, peak)
            mass = mass * _exp(tl.minimum(before - reference, 0.0)) + tl.sum(_exp(u - reference), 0)
            if SOFT:
                q = _soft_weights(
                    q_body, offsets, head, offsets, mask, weight_ptr, label_smoothing, smooth_share, SMOOTH, WIDE
                )
                weighted += visited * (before - reference) + tl.sum(tl.where(mask, q * (u - reference), 0.0), 0)
                visited += tl.sum(q, 0)
            elif SMOOTH:
                z = _weighted(u - reference, head, offsets, mask, weight_ptr, WIDE)
                weighted += visited * (before - reference) + tl.sum(z, 0)
                visited += tl.sum(
                    _weighted(tl.full([BLOCK], 1.0, tl.float32), head, offsets, mask, weight_ptr, WIDE), 0
                )
            if prediction_ptr is not None:
                tile_best, tile_column = _best(x, head + offsets, mask)
                best, prediction = _better(best, prediction, tile_best, tile_column)
        peak = tl.where(peak == -_INF, 0.0, peak)

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
    else:
        if SMOOTH:
            weighted += tl.sum(_weighted(u_edge - peak, 0, edge, rest_mask, weight_ptr, False), 0)
        loss, lse = _loss(peak, mass, weighted, a, b, weight_total, label_smoothing, smooth_share, MIXED, SMOOTH)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(rest_ptr + row, peak)
    tl.store(rest_ptr + rows + row, mass)
    if prediction_ptr is not None:
        tl.store(prediction_ptr + row, prediction.to(tl.int64))

    if grad_ptr is not None:
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
            du = _at_targets(edge, du, a, b, plain_a, dv_a, plain_b, dv_b, MIXED)
        dx = _unscaled(du, 0, edge, edge_mask, class_scale_ptr, scale, HAS_SCALE, False)
        tl.store(grad_ptr + grad_offset + edge, dx.to(grad_ptr.dtype.element_ty), mask=edge_mask)
        if ONE_TILE:
            if not SOFT:
                q = e
            du = _ordinary(e, slope, smooth, q, head, offsets, mask, weight_ptr, SMOOTH, SOFT, WIDE)
            dx = _unscaled(du, head, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)
            tl.store(grad_ptr + grad_aligned + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
        else:
            for begin in range(0, groups * GROUP, BLOCK):
                offsets = begin + tl.arange(0, BLOCK)
                mask = _body(offsets, groups, group_a, group_b, GROUP)
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
                tl.store(grad_ptr + grad_aligned + offsets, tile_dx.to(grad_ptr.dtype.element_ty), mask=mask)


# --- rows: backward --------------------------------------------------------------------------------------------------


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
    grad_loss_ptr,  # 0-dim or [N, K]
    grad_lse_ptr,  # 0-dim or [N, K]
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
    BLOCK: tl.constexpr,
):
    """The input's gradient, one program per row and BLOCK columns of its body; the first also does the edge."""
    WIDE: tl.constexpr = GROUP >= 4
    MIXED: tl.constexpr = mixed_target_ptr is not None
    rows = tl.num_programs(0)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
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
        a, b = _slots(
            row_ptr, row, target_ptr, mixed_target_ptr, mix_lambda_ptr, coefficient_ptr, weight_ptr, class_bias_ptr,
            class_scale_ptr, margin_ptr, classes, 1, mix_lambda_stride, scale, margin, cos_margin, sin_margin,
            ignore_index, ANGULAR,
        )  # fmt: skip
        group_a = _group_of(a, head, groups, GROUP)
        if MIXED:
            group_b = _group_of(b, head, groups, GROUP)
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
                target_ptr + q_offset,
                edge,
                0,
                edge,
                edge_mask,
                weight_ptr,
                label_smoothing,
                smooth_share,
                SMOOTH,
                False,
            )
        du = _ordinary(e, slope, smooth, q, 0, edge, edge_mask, weight_ptr, SMOOTH, SOFT, False)
        if not SOFT:
            du = _at_targets(edge, du, a, b, plain_a, dv_a, plain_b, dv_b, MIXED)
        dx = _unscaled(du, 0, edge, edge_mask, class_scale_ptr, scale, HAS_SCALE, False)
        tl.store(grad_ptr + grad_offset + edge, dx.to(grad_ptr.dtype.element_ty), mask=edge_mask)

    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    mask = _body(offsets, groups, group_a, group_b, GROUP)
    x = tl.load(input_ptr + aligned + offsets, mask=mask, other=-_INF).to(tl.float32)
    u = _shifted(x, head, offsets, mask, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, WIDE)
    e = _exp(u - peak)
    q = e
    if SOFT:
        q = _soft_weights(
            target_ptr + q_aligned,
            offsets,
            head,
            offsets,
            mask,
            weight_ptr,
            label_smoothing,
            smooth_share,
            SMOOTH,
            WIDE,
        )
    du = _ordinary(e, slope, smooth, q, head, offsets, mask, weight_ptr, SMOOTH, SOFT, WIDE)
    dx = _unscaled(du, head, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)
    tl.store(grad_ptr + grad_aligned + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)


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
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    MIXED: tl.constexpr = mixed_target_ptr is not None
    n, k, inside, row = _positions(tl.program_id(0), positions, BLOCK_K)
    row_ptr = input_ptr + n * input_stride_n + tl.minimum(k, positions - 1) * input_stride_k
    tile_ptr = input_ptr + n * input_stride_n + k[None, :] * input_stride_k
    q_ptr = target_ptr
    scale = _full_scale(scale, learned_scale_ptr)
    smooth_share = label_smoothing / classes
    if SOFT:
        q_ptr = target_ptr + n * target_stride_n + k[None, :] * target_stride_k
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

    peak = tl.full([BLOCK_K], -_INF, tl.float32)
    mass = tl.zeros([BLOCK_K], tl.float32)
    weighted = tl.zeros([BLOCK_K], tl.float32)
    visited = tl.zeros([BLOCK_K], tl.float32)
    best = tl.full([BLOCK_K], -_INF, tl.float32)
    prediction = tl.full([BLOCK_K], _NO_COLUMN, tl.int32)
    for begin in range(0, classes, BLOCK_C):
        columns = begin + tl.arange(0, BLOCK_C)[:, None]
        real = columns < classes
        mask = real & inside[None, :]
        offsets = columns.to(tl.int64) * input_stride_c
        x = tl.load(tile_ptr + offsets, mask=mask, other=-_INF, eviction_policy="evict_last").to(tl.float32)
        u = _shifted(x, 0, columns, real, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
        counted = mask
        if not SOFT:
            counted = counted & (columns != column_a[None, :])
            if MIXED:
                counted = counted & (columns != column_b[None, :])
            u = tl.where(counted, u, -_INF)
        # `peak` may be -inf, `reference` never is; sums so far are relative to the reference of the tile before
        before = tl.where(peak == -_INF, 0.0, peak)
        peak = tl.maximum(peak, tl.max(u, 0))
        reference = tl.where(peak == -_INF, 0.0, peak)
        mass = mass * _exp(tl.minimum(before - reference, 0.0)) + tl.sum(_exp(u - reference[None, :]), 0)
        if SOFT:
            q = _soft_weights(
                q_ptr, columns.to(tl.int64) * target_stride_c, 0, columns, mask, weight_ptr, label_smoothing,
                smooth_share, SMOOTH, False,
            )  # fmt: skip
            z = tl.where(mask, q * (u - reference[None, :]), 0.0)
            weighted += visited * (before - reference) + tl.sum(z, 0)
            visited += tl.sum(q, 0)
        elif SMOOTH:
            z = _weighted(u - reference[None, :], 0, columns, counted, weight_ptr, False)
            weighted += visited * (before - reference) + tl.sum(z, 0)
            visited += tl.sum(
                _weighted(tl.full([BLOCK_C, BLOCK_K], 1.0, tl.float32), 0, columns, counted, weight_ptr, False), 0
            )
        if prediction_ptr is not None:
            tile_best, tile_prediction = _best(x, columns, mask)
            best, prediction = _better(best, prediction, tile_best, tile_prediction)
    peak = tl.where(peak == -_INF, 0.0, peak)

    if SOFT:
        log_mass = tl.log(mass)
        loss, lse = factor * (visited * log_mass - weighted), peak + log_mass
    else:
        loss, lse = _loss(peak, mass, weighted, a, b, weight_total, label_smoothing, smooth_share, MIXED, SMOOTH)
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(rest_ptr + row, peak, mask=inside)
    tl.store(rest_ptr + rows + row, mass, mask=inside)
    if prediction_ptr is not None:
        tl.store(prediction_ptr + row, prediction.to(tl.int64), mask=inside)

    if grad_ptr is not None:
        grad_tile_ptr = grad_ptr + n * grad_stride_n + k[None, :] * grad_stride_k
        if SOFT:
            slope, smooth = factor * visited / mass, factor
        else:
            slope, smooth, plain_a, dv_a, plain_b, dv_b = _slopes(
                peak, mass, a, b, 1.0, 0.0, weight_total, label_smoothing, smooth_share, MIXED
            )
            smooth = smooth[None, :]
        for begin in range(0, classes, BLOCK_C):
            columns = begin + tl.arange(0, BLOCK_C)[:, None]
            real = columns < classes
            mask = real & inside[None, :]
            offsets = columns.to(tl.int64) * input_stride_c
            x = tl.load(tile_ptr + offsets, mask=mask, other=-_INF, eviction_policy="evict_first").to(tl.float32)
            u = _shifted(x, 0, columns, real, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
            e = _exp(u - peak[None, :])
            q = e
            if SOFT:
                q = _soft_weights(
                    q_ptr, columns.to(tl.int64) * target_stride_c, 0, columns, mask, weight_ptr, label_smoothing,
                    smooth_share, SMOOTH, False,
                )  # fmt: skip
            du = _ordinary(e, slope[None, :], smooth, q, 0, columns, real, weight_ptr, SMOOTH, SOFT, False)
            if not SOFT:
                du = _at_targets(columns, du, a, b, plain_a, dv_a, plain_b, dv_b, MIXED)
            dx = _unscaled(du, 0, columns, real, class_scale_ptr, scale, HAS_SCALE, False)
            offsets = columns.to(tl.int64) * grad_stride_c
            tl.store(grad_tile_ptr + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)


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
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over the classes of w_j ((1 - smoothing) q_j + smoothing / C)."""
    n, k, inside, row = _positions(tl.program_id(0), positions, BLOCK_K)
    q_ptr = target_ptr + n * target_stride_n + k[None, :] * target_stride_k
    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for begin in range(0, classes, BLOCK_C):
        columns = begin + tl.arange(0, BLOCK_C)[:, None]
        mask = (columns < classes) & inside[None, :]
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
    terms_ptr,  # [12, N, K]: slope, smooth; of each target d/d(u_y), dv, dv dphi/dc, dv phi, dv dphi/dm
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
        _store_terms(out_ptr + 2 * size, columns_ptr + row, size, a, plain_a, dv_a, inside)
        if MIXED:
            _store_terms(out_ptr + 7 * size, columns_ptr + size + row, size, b, plain_b, dv_b, inside)


@triton.jit
def _store_terms(out_ptr, column_ptr, size, slot, plain, dv, inside):
    column, _, _, _, _, _, phi, dphi_dc, dphi_dm = slot
    tl.store(column_ptr, column, mask=inside)
    tl.store(out_ptr, plain, mask=inside)
    tl.store(out_ptr + size, dv, mask=inside)
    tl.store(out_ptr + 2 * size, dv * dphi_dc, mask=inside)
    tl.store(out_ptr + 3 * size, dv * phi, mask=inside)
    tl.store(out_ptr + 4 * size, dv * dphi_dm, mask=inside)


@triton.jit
def _add_terms(values, columns, column_a, column_b, terms_ptr, size, MIXED: tl.constexpr):
    """values plus one kind of term in each target's column."""
    values += tl.where(columns == column_a, tl.load(terms_ptr)[None, :], 0.0)
    if MIXED:
        values += tl.where(columns == column_b, tl.load(terms_ptr + 5 * size)[None, :], 0.0)
    return values


@triton.jit(do_not_specialize=["rows", "blocks", "blocks_per_program"])
def _tiles_backward_kernel(
    input_ptr,  # [N, C, K]
    target_ptr,  # [N, C, K] probabilities; not read unless SOFT
    weight_ptr,  # [C]
    class_bias_ptr,  # [C]
    class_scale_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    rest_ptr,  # [2, N, K]
    terms_ptr,  # [12, N, K], see _terms_kernel
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
    NEED_BIAS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_MARGIN: tl.constexpr,
    NEED_LEARNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All gradients; one program per BLOCK_C columns and ``blocks_per_program`` blocks of BLOCK_K rows, in order."""
    NEEDED: tl.constexpr = NEED_BIAS + NEED_SCALE + NEED_MARGIN + NEED_LEARNED
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    real = columns < classes
    scale = _full_scale(scale, learned_scale_ptr)
    size = tl.cast(rows, tl.int64)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    sum_scale = tl.zeros([BLOCK_C], tl.float32)
    sum_margin = tl.zeros([BLOCK_C], tl.float32)
    sum_learned = tl.zeros([BLOCK_C], tl.float32)
    first_block = tl.program_id(0) * blocks_per_program
    for block in range(first_block, tl.minimum(first_block + blocks_per_program, blocks)):
        n, k, inside, row = _positions(block, positions, BLOCK_K)
        mask = real & inside[None, :]
        offsets = k[None, :] * input_stride_k + columns.to(tl.int64) * input_stride_c
        x = tl.load(input_ptr + n * input_stride_n + offsets, mask=mask, other=-_INF).to(tl.float32)
        u = _shifted(x, 0, columns, real, class_bias_ptr, class_scale_ptr, scale, HAS_SCALE, False)
        u = u - tl.load(rest_ptr + row)[None, :]
        e = _exp(u)
        slope = tl.load(terms_ptr + row)[None, :]
        smooth = tl.load(terms_ptr + size + row)[None, :]
        q = e
        if SOFT:
            q = _soft_weights(
                target_ptr + n * target_stride_n + k[None, :] * target_stride_k,
                columns.to(tl.int64) * target_stride_c, 0, columns, mask, weight_ptr, label_smoothing,
                label_smoothing / classes, SMOOTH, False,
            )  # fmt: skip
            if grad_target_ptr is not None:
                log_mass = tl.log(tl.load(rest_ptr + size + row))[None, :]
                dq = smooth * (label_smoothing - 1.0) * (u - log_mass)
                if weight_ptr is not None:
                    dq = dq * _class_values(weight_ptr, 0, columns, real, 0.0, False, True)
                offsets = k[None, :] * grad_target_stride_k + columns.to(tl.int64) * grad_target_stride_c
                offsets += n * grad_target_stride_n
                tl.store(grad_target_ptr + offsets, dq.to(grad_target_ptr.dtype.element_ty), mask=mask)
        du = _ordinary(e, slope, smooth, q, 0, columns, real, weight_ptr, SMOOTH, SOFT, False)
        through = du
        own_ptr = terms_ptr + 2 * size + row
        if not SOFT:
            column_a = tl.load(columns_ptr + row)[None, :]
            column_b = column_a
            du = tl.where(columns == column_a, tl.load(own_ptr)[None, :], du)
            if MIXED:
                column_b = tl.load(columns_ptr + size + row)[None, :]
                du = tl.where(columns == column_b, tl.load(own_ptr + 5 * size)[None, :], du)
            through = _add_terms(du, columns, column_a, column_b, own_ptr + 2 * size, size, MIXED)
        if grad_ptr is not None:
            dx = _unscaled(through, 0, columns, real, class_scale_ptr, scale, HAS_SCALE, False)
            offsets = k[None, :] * grad_stride_k + columns.to(tl.int64) * grad_stride_c
            tl.store(grad_ptr + n * grad_stride_n + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
        if NEED_BIAS:
            values = du
            if not SOFT:
                values = _add_terms(du, columns, column_a, column_b, own_ptr + size, size, MIXED)
            sum_bias += tl.sum(tl.where(mask, values, 0.0), 1)
        if NEED_SCALE:
            sum_scale += tl.sum(tl.where(mask, scale * through * x, 0.0), 1)
        if NEED_MARGIN:
            values = _add_terms(tl.zeros_like(e), columns, column_a, column_b, own_ptr + 4 * size, size, MIXED)
            sum_margin += tl.sum(tl.where(mask, scale * values, 0.0), 1)
        if NEED_LEARNED:
            values = _unscaled(du * x, 0, columns, real, class_scale_ptr, 1.0, False, False)
            if not SOFT:
                values = _add_terms(values, columns, column_a, column_b, own_ptr + 3 * size, size, MIXED)
            sum_learned += tl.sum(tl.where(mask, values, 0.0), 1)
    if NEEDED > 0:
        column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * NEEDED * classes + column
        if NEED_BIAS:
            tl.store(out_ptr, sum_bias, mask=column < classes)
        if NEED_SCALE:
            tl.store(out_ptr + NEED_BIAS * classes, sum_scale, mask=column < classes)
        if NEED_MARGIN:
            tl.store(out_ptr + (NEED_BIAS + NEED_SCALE) * classes, sum_margin, mask=column < classes)
        if NEED_LEARNED:
            tl.store(out_ptr + (NEED_BIAS + NEED_SCALE + NEED_MARGIN) * classes, sum_learned, mask=column < classes)


@triton.jit
def _scale_kernel(
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


# --- launch table ----------------------------------------------------------------------------------------------------

#: Rows of at most this many classes share a program (tiles); above, each row has its own.
_TILED_CLASSES = 128
#: Largest body that one program keeps in registers, by the number of register-hungry options (class_scale, weighted
#: smoothing, class probabilities, prediction), and how many logits a thread then holds: what compiles without spills.
_ONE_TILE = ((32768, 64), (16384, 64), (8192, 32))
#: How many programs the class vectors' gradients are split into, about.
_PARTIAL_PROGRAMS = 1024


class _RowsLaunch(NamedTuple):
    group: int
    block: int
    one_tile: bool
    num_warps: int


class _TilesLaunch(NamedTuple):
    block_c: int
    block_k: int
    num_warps: int


def _rows_block(classes: int, itemsize: int, aligned: bool) -> tuple[int, int]:
    """Columns of a group, and of the smallest block that holds every whole group of a row."""
    group = 16 // itemsize if aligned else 1
    return group, max(triton.next_power_of_2(max(classes // group, 1)) * group, 512)


def _rows_launch(classes: int, itemsize: int, aligned: bool, hungry_options: int = 0) -> _RowsLaunch:
    group, block = _rows_block(classes, itemsize, aligned)
    largest, per_thread = _ONE_TILE[min(hungry_options, 2)]
    one_tile = block <= largest
    if not one_tile:
        block, per_thread = 8192, 32
    return _RowsLaunch(group, block, one_tile, max(block // (32 * per_thread), 1))


def _rows_backward_launch(classes: int, itemsize: int, aligned: bool) -> _RowsLaunch:
    """No reduction, so a row may be split over programs of at most 4096 columns."""
    group, block = _rows_block(classes, itemsize, aligned)
    block = min(block, 4096)
    return _RowsLaunch(group, block, False, max(block // 1024, 1))


def _tiles_launch(classes: int, positions: int, classes_contiguous: bool) -> _TilesLaunch:
    """Long side along the contiguous axis; a thread that holds more rows repeats the rows' arithmetic more often."""
    if classes_contiguous:
        block_c = min(triton.next_power_of_2(classes), 256)
        block_k = min(triton.next_power_of_2(positions), 1024 // block_c)
    else:
        block_k = min(triton.next_power_of_2(positions), 128)
        block_c = min(triton.next_power_of_2(classes), 2048 // block_k)
    return _TilesLaunch(block_c, block_k, 4)


def _blocks_per_program(blocks: int, class_tiles: int) -> int:
    """Blocks of rows that one program of the class vectors' gradients adds up."""
    return triton.cdiv(blocks, min(blocks, max(1, _PARTIAL_PROGRAMS // class_tiles)))


# --- launchers -------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How the kernels see one call: its shape, and strides by kernel argument."""

    rows: bool  # the rows kernels, else the tiles kernels
    samples: int
    positions: int
    aligned: bool  # whether the groups of all tensors begin on 16 bytes together
    classes_contiguous: bool
    strides: dict[str, int]


def _readable(x: Tensor) -> Tensor:
    """x [N, C, K] itself where its classes or its rows are contiguous, else a contiguous copy."""
    _, classes, k = x.shape
    row_stride = x.stride(0) if k == 1 else x.stride(2)
    return x if classes == 1 or x.stride(1) == 1 or row_stride == 1 else x.contiguous()


def _layout(named: dict[str, Tensor], rows: bool = True) -> _Layout:
    """named: the [N, C, K] tensors of a kernel, input first; rows: whether the rows kernels may be used."""
    x = named["input"]
    n, classes, k = x.shape
    strides = {name: t.stride() for name, t in named.items()}
    contiguous = classes == 1 or x.stride(1) == 1
    rows = rows and classes > _TILED_CLASSES and all(s[1] == 1 for s in strides.values())
    samples, positions, aligned = n, k, False
    if rows:
        if k > 1 and all(s[0] == k * s[2] for s in strides.values()):  # channels last: one row after another
            samples, positions, strides = n * k, 1, {name: (s[2], s[1], 0) for name, s in strides.items()}
        group = 16 // x.element_size()
        starts = {(s[0] % group, s[2] % group if positions > 1 else 0) for s in strides.values()}
        aligned = len(starts) == 1 and all(t.data_ptr() % 16 == 0 for t in named.values())
    elif k == 1:
        samples, positions, strides = 1, n, {name: (0, s[1], s[0]) for name, s in strides.items()}
    by_argument = {
        f"{name}_stride_{axis}": stride
        for name, three in strides.items()
        for axis, stride in zip("nck", three, strict=True)
        if axis != "c" or not rows
    }
    return _Layout(rows, samples, positions, aligned, contiguous, by_argument)


def _shared(a: Arguments) -> dict[str, Any]:
    """Arguments that every kernel takes, beside input and target."""
    margin = a.class_margin
    if margin is not None:
        margin = margin + a.margin
        if a.angular:
            margin = torch.stack([margin, margin.cos(), margin.sin()])
    soft, smooth = a.target.is_floating_point(), a.label_smoothing > 0
    mixed, share = a.mixed_target, a.mix_lambda
    return {
        "mixed_target_ptr": None if mixed is None else mixed.contiguous(),
        "mix_lambda_ptr": None if share is None else share.contiguous(),
        "weight_ptr": a.weight,
        "weight_total_ptr": a.weight.sum() if smooth and a.weight is not None and not soft else None,
        "class_bias_ptr": a.class_bias,
        "class_scale_ptr": a.class_scale,
        "margin_ptr": margin,
        "learned_scale_ptr": a.learned_scale,
        "coefficient_ptr": a.coefficient,
        "classes": a.input.shape[1],
        "mix_lambda_stride": 0 if share is None or share.dim() == 0 else 1,
        "scale": a.scale,
        "margin": a.margin,
        "cos_margin": math.cos(a.margin),
        "sin_margin": math.sin(a.margin),
        "ignore_index": a.ignore_index,
        "label_smoothing": a.label_smoothing,
        "HAS_SCALE": a.learned_scale is not None or a.scale != 1.0,
        "ANGULAR": a.angular,
        "SMOOTH": smooth,
        "SOFT": soft,
    }


def forward(a: Arguments, with_prediction: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    n, classes, k = a.input.shape
    soft = a.target.is_floating_point()
    loss, lse = (a.input.new_empty((n, k), dtype=torch.float32) for _ in range(2))
    rest = loss.new_empty((2, n, k))
    prediction = loss.new_empty((n, k) if with_prediction else (0,), dtype=torch.int64)
    grad = torch.empty_like(a.input) if with_grad else a.input.new_empty((0,))
    if n * k == 0:
        return loss, lse, prediction, rest, grad
    x = _readable(a.input)
    target = a.target if soft else a.target.contiguous()
    named = {"input": x, **({"target": target} if soft else {}), **({"grad": grad} if with_grad else {})}
    layout = _layout(named)
    arguments = {
        "input_ptr": x,
        "target_ptr": target,
        "loss_ptr": loss,
        "lse_ptr": lse,
        "prediction_ptr": prediction if with_prediction else None,
        "rest_ptr": rest,
        "grad_ptr": grad if with_grad else None,
        "positions": layout.positions,
        **_shared(a),
    }
    axes = "nk" if layout.rows else "nck"
    arguments.update({f"{name}_stride_{axis}": 0 for name in ("target", "grad") for axis in axes}, **layout.strides)
    with torch.cuda.device_of(x):
        if layout.rows:
            hungry = [a.class_scale is not None, a.weight is not None and a.label_smoothing > 0, soft, with_prediction]
            rows = _rows_launch(classes, x.element_size(), layout.aligned, sum(hungry))
            _rows_forward_kernel[(n * k,)](
                **arguments, GROUP=rows.group, BLOCK=rows.block, ONE_TILE=rows.one_tile, num_warps=rows.num_warps
            )
        else:
            tiles = _tiles_launch(classes, layout.positions, layout.classes_contiguous)
            blocks = layout.samples * triton.cdiv(layout.positions, tiles.block_k)
            _tiles_forward_kernel[(blocks,)](
                **arguments, rows=n * k, BLOCK_C=tiles.block_c, BLOCK_K=tiles.block_k, num_warps=tiles.num_warps
            )
    return loss, lse, prediction, rest, grad


def _per_row(upstream: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int]:
    """The upstream gradient and the step between rows: 0 for one value for all rows."""
    if upstream is None:
        return None, 0
    upstream = upstream.to(torch.float32)
    if all(stride == 0 for stride in upstream.stride()):
        return upstream, 0
    return upstream.expand(shape).contiguous(), 1


def backward(grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, a: Arguments, needs: list[bool]) -> list[Tensor]:
    """Gradients of ``DIFFERENTIABLE``, each like its input; [0] where not needed. Upstream: 0-dim or [N, K]."""
    n, classes, k = a.input.shape
    soft, summed = a.target.is_floating_point(), needs[2:]
    sources = [getattr(a, name) for name in DIFFERENTIABLE]
    if n * k == 0:
        return [torch.zeros_like(t) if need else rest.new_empty((0,)) for t, need in zip(sources, needs, strict=True)]
    grads = [rest.new_empty((0,)) for _ in needs]
    x = _readable(a.input)
    target = a.target if soft else a.target.contiguous()
    named = {"input": x, **({"target": target} if soft else {})}
    for position, name in enumerate(("grad", "grad_target")):
        if needs[position]:
            named[name] = grads[position] = torch.empty_like(sources[position])
    layout = _layout(named, rows=not any(needs[1:]))
    per_loss, grad_loss_stride = _per_row(grad_loss, rest.shape[1:])
    per_lse, grad_lse_stride = _per_row(grad_lse, rest.shape[1:])
    shared = _shared(a)
    with torch.cuda.device_of(x):
        arguments = {
            "input_ptr": x,
            "target_ptr": target,
            "rest_ptr": rest,
            "soft_mass_ptr": _soft_mass(a) if soft else None,
            "grad_loss_ptr": per_loss,
            "grad_lse_ptr": per_lse,
            "positions": layout.positions,
            "grad_loss_stride": grad_loss_stride,
            "grad_lse_stride": grad_lse_stride,
            **shared,
        }
        if layout.rows:
            rows = _rows_backward_launch(classes, x.element_size(), layout.aligned)
            strides = {f"{name}_stride_{axis}": 0 for name in ("target", "grad") for axis in "nk"} | layout.strides
            grid = (n * k, triton.cdiv(max(classes // rows.group, 1) * rows.group, rows.block))
            _rows_backward_kernel[grid](
                **arguments, **strides, grad_ptr=grads[0], GROUP=rows.group, BLOCK=rows.block, num_warps=rows.num_warps
            )
            return grads
        terms = rest.new_empty((12, n, k))
        columns = rest.new_empty((2, n, k), dtype=torch.int32)
        _terms_kernel[(triton.cdiv(n * k, 128),)](
            **arguments,
            **{name: stride for name, stride in layout.strides.items() if name.startswith("input")},
            terms_ptr=terms,
            columns_ptr=columns,
            rows=n * k,
            BLOCK=128,
            num_warps=4,
        )
        tiles = _tiles_launch(classes, layout.positions, layout.classes_contiguous)
        blocks = layout.samples * triton.cdiv(layout.positions, tiles.block_k)
        class_tiles = triton.cdiv(classes, tiles.block_c)
        per_program = _blocks_per_program(blocks, class_tiles) if any(summed) else 1
        programs = triton.cdiv(blocks, per_program)
        partial = rest.new_empty((programs, sum(summed), classes)) if any(summed) else None
        names = ("target", "grad", "grad_target")
        strides = {f"{name}_stride_{axis}": 0 for name in names for axis in "nck"} | layout.strides
        _tiles_backward_kernel[(programs, class_tiles)](
            x,
            target,
            a.weight,
            a.class_bias,
            a.class_scale,
            a.learned_scale,
            rest,
            terms,
            columns,
            grads[0] if needs[0] else None,
            grads[1] if needs[1] else None,
            partial,
            n * k,
            classes,
            layout.positions,
            blocks,
            per_program,
            **strides,
            scale=a.scale,
            label_smoothing=a.label_smoothing,
            HAS_SCALE=shared["HAS_SCALE"],
            SMOOTH=shared["SMOOTH"],
            SOFT=soft,
            MIXED=a.mixed_target is not None,
            NEED_BIAS=needs[2],
            NEED_SCALE=needs[3],
            NEED_MARGIN=needs[4],
            NEED_LEARNED=needs[5],
            BLOCK_C=tiles.block_c,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps,
        )
    if partial is not None:
        sums = iter(partial.sum(0))
        for position in range(2, len(needs)):
            if needs[position]:
                grads[position] = next(sums)
        if needs[5]:
            grads[5] = a.scale * grads[5].sum()
    return grads


def _soft_mass(a: Arguments) -> Tensor:
    """Sum of the soft weights of every row, [N, K]."""
    n, classes, k = a.input.shape
    mass = a.input.new_empty((n, k), dtype=torch.float32)
    layout = _layout({"input": a.target}, rows=False)
    tiles = _tiles_launch(classes, layout.positions, layout.classes_contiguous)
    _soft_mass_kernel[(layout.samples * triton.cdiv(layout.positions, tiles.block_k),)](
        a.target,
        a.weight,
        mass,
        classes,
        layout.positions,
        layout.strides["input_stride_n"],
        layout.strides["input_stride_c"],
        layout.strides["input_stride_k"],
        a.label_smoothing,
        SMOOTH=a.label_smoothing > 0,
        BLOCK_C=tiles.block_c,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
    )
    return mass


def scale_gradient_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor (0-dim, on the device), reading and writing nothing where it is 1. Any dense ``grad``."""
    elements, block = grad.numel(), 4096
    with torch.cuda.device_of(grad):
        if elements > 0:
            programs = min(triton.cdiv(elements, block), 1024)
            _scale_kernel[(programs,)](grad, factor, elements, BLOCK=block, num_warps=8)
