"""The arithmetic of one row in Triton: its targets, loss and slopes, and the gradient of its columns.

A function takes a row's scalars or, where a program has several rows, a block of each. ``row_terms.py`` has the same
formulas in eager PyTorch. Exponentials are natural: folding log2(e) into u would round u.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .._triton import interpreting
from .options import Slot

INTERPRETED = tl.constexpr(interpreting())
INF = tl.constexpr(float("inf"))
NO_COLUMN = tl.constexpr(2**31 - 1)
SIN2_MIN = tl.constexpr(1e-7)  # as in row_terms.py


class Label(NamedTuple):
    """A row's class."""

    index: Any  # 0 where there is no class
    valid: Any  # whether the row is not ignored
    column: Any  # int32; -1 where there is no class


class Statistics(NamedTuple):
    """Sums over the columns that are no target of the row."""

    peak: Any  # maximum of u, -inf if there is no column
    mass: Any  # sum of exp(u - peak)
    weighted: Any  # sum of w_j (u_j - peak)
    visited: Any  # sum of w_j
    best: Any  # largest logit, where a prediction is asked for
    column: Any  # its first column


class SlotGradient(NamedTuple):
    """The gradient that reaches a target's column."""

    plain: Any  # d/d(u_y) through the other target's term
    shifted: Any  # d/d(v)


class Slopes(NamedTuple):
    """d/d(u_j) = slope exp(u_j - peak) - smooth smooth_weight_j of an ordinary column j, and the targets' gradients."""

    slope: Any
    smooth: Any
    a: Any  # SlotGradient; None where targets are probabilities
    b: Any


class TargetValues(NamedTuple):
    """The values in the columns of both targets, in place of an ordinary column's."""

    column_a: Any
    value_a: Any
    column_b: Any
    value_b: Any


# --- elementary functions --------------------------------------------------------------------------------------------


@triton.jit
def fast_exp(x):
    """Return exp(x), 0 where it is below 1e-38: ``tl.exp`` spends 3 more instructions to keep such numbers."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def affine(x, a, b):
    """Return a x + b (b: 0 if None) with one rounding: every kernel computes u so.

    The compiler otherwise fuses a product with the next sum, in one kernel with the bias and in another with -peak. At
    |u| of some hundred an exponential would then be off by the rounding of u in the kernel that found the peak.
    """
    return tl.fma(x, a, 0.0 if b is None else b)


@triton.jit
def log1p_exp(x):
    """Return log(1 + exp(x)) for x <= 0."""
    z = fast_exp(x)
    w = 1.0 + z  # log1p(z) = log(w) z / (w - 1): the rounding of w cancels
    return tl.where(w == 1.0, z, tl.log(w) * (z / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def add_exp(a, b):
    """Return log(exp(a) + exp(b))."""
    high = tl.maximum(a, b)
    return tl.where(high == -INF, high, high + log1p_exp(tl.minimum(a, b) - high))


@triton.jit
def load_scale(scale, learned_scale_ptr):
    """Return the scale times the learned one."""
    if learned_scale_ptr is not None:
        scale = scale * tl.load(learned_scale_ptr)
    return scale


@triton.jit
def load_factor(o):
    """Return the factor of every row's loss where targets are probabilities."""
    factor = tl.full([], 1.0, tl.float32)
    if o.coefficient_ptr is not None:
        factor = tl.load(o.coefficient_ptr)
    return factor


@triton.jit
def load_smooth_share(o, classes):
    """Return what a class's smooth weight is multiplied by."""
    if o.smoothing_ptr is not None:
        share = 1.0
    else:
        share = o.label_smoothing / classes
    return share


@triton.jit
def times_weight(weight, z, o):
    """Return weight times z, 0 where a class has no weight: a masked one's z is -inf."""
    product = weight * z
    if o.masks:
        product = tl.where(weight == 0.0, 0.0, product)
    return product


@triton.jit
def load_smooth_total(o, classes):
    """Return the sum of the smooth weights."""
    if o.smooth_total_ptr is not None:
        total = tl.load(o.smooth_total_ptr)
    else:
        total = classes * tl.full([], 1.0, tl.float32)
    return total


@triton.jit
def finite_reference(peak):
    """Return what exponentials are taken relative to: the maximum, but never -inf."""
    return tl.where(peak == -INF, 0.0, peak)


@triton.jit
def rescale_sums(peak, mass, weighted, visited, common):
    """Return mass and weighted, sums relative to ``peak``, relative to the larger ``common``."""
    below = finite_reference(peak) - finite_reference(common)
    return mass * fast_exp(tl.minimum(below, 0.0)), weighted + visited * below


@triton.jit
def start_sums(zeros):
    """Return the statistics of no columns; ``zeros``: one for each that is summed."""
    nothing = tl.full(zeros.shape, -INF, tl.float32)
    return Statistics(nothing, zeros, zeros, zeros, nothing, tl.full(zeros.shape, NO_COLUMN, tl.int32))


@triton.jit
def load_upstream(rest_ptr, grad_loss_ptr, grad_lse_ptr, row, rows, grad_loss_stride, grad_lse_stride):
    """Load what backward has of a row: the maximum and the sum of exponentials of ``rest``, and the upstream gradients
    of the loss (1 if there is none) and of the log-sum-exp."""
    peak = tl.load(rest_ptr + row)
    mass = tl.load(rest_ptr + rows + row)
    upstream = tl.full([], 1.0, tl.float32)
    if grad_loss_ptr is not None:
        upstream = tl.load(grad_loss_ptr + row * grad_loss_stride)
    upstream_lse = 0.0
    if grad_lse_ptr is not None:
        upstream_lse = tl.load(grad_lse_ptr + row * grad_lse_stride)
    return peak, mass, upstream, upstream_lse


# --- targets ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_label(target_ptr, classes, ignore_index):
    """Return the row's label."""
    target = tl.load(target_ptr)
    valid = target != ignore_index
    known = valid & (target >= 0) & (target < classes)
    return Label(tl.where(known, target, 0), valid, tl.where(known, target, -1).to(tl.int32))


@triton.jit
def show_overflow(logit):
    """Return a target's logit, NaN where it is infinite: so is its row, as in torch.

    That of an ordinary column makes it so by its difference from the peak; a target's is in no peak, and its loss would
    be 0.
    """
    return tl.where(logit == INF, float("nan"), logit)


@triton.jit
def make_slot(x, label, share, o, scale, classes, SLOT: tl.constexpr):
    """Return a target of the row from its logit x. A class out of range makes its logits NaN."""
    index, valid, column = label.index, label.valid, label.column
    x = tl.where(valid & (column < 0), float("nan"), x)
    one = tl.full([], 1.0, tl.float32)
    factor, weight, class_scale, bias = share * one, one, one, one * 0.0
    if o.coefficient_ptr is not None:
        factor = share * tl.load(o.coefficient_ptr + SLOT)
    factor = tl.where(valid, factor, factor * 0.0)  # NaN where the mean is over no weight at all, as in torch
    if o.weight_ptr is not None:
        weight = tl.load(o.weight_ptr + index)
    smooth_weight = weight
    if o.smoothing_ptr is not None:
        smooth_weight = tl.load(o.smooth_weight_ptr + index)
    if o.class_scale_ptr is not None:
        class_scale = tl.load(o.class_scale_ptr + index)
    if o.class_bias_ptr is not None:
        bias = tl.load(o.class_bias_ptr + index)
    margin, cos_margin, sin_margin = o.margin, o.cos_margin, o.sin_margin
    if o.margin_ptr is not None:
        margin = tl.load(o.margin_ptr + index)
        if o.angular:
            cos_margin = tl.load(o.margin_ptr + classes + index)
            sin_margin = tl.load(o.margin_ptr + 2 * classes + index)
    cosine = class_scale * x
    if o.angular:
        sin2 = 1.0 - cosine * cosine
        sine = tl.sqrt_rn(tl.maximum(sin2, 0.0))
        cotangent = cosine / tl.sqrt_rn(tl.maximum(sin2, SIN2_MIN))
        beyond = cosine < -cos_margin  # theta > pi - m
        phi = tl.where(beyond, cosine - margin * sin_margin, cosine * cos_margin - sine * sin_margin)
        dphi_dc = tl.where(beyond, 1.0, cos_margin + cotangent * sin_margin)
        dphi_dm = -tl.where(beyond, sin_margin + margin * cos_margin, sine * cos_margin + cosine * sin_margin)
    else:
        phi = cosine - margin
        dphi_dc, dphi_dm = one, -one
    plain = show_overflow(affine(x, scale * class_scale, bias))
    shifted = show_overflow(affine(phi, scale, bias))
    return Slot(column, valid, factor, weight, smooth_weight, plain, shifted, cosine, phi, dphi_dc, dphi_dm)


@triton.jit
def load_slot(row_ptr, target_ptr, share, o, scale, classes, class_stride, ignore_index, SLOT: tl.constexpr):
    """Return a target of the row whose first logit is at ``row_ptr`` and whose class is at ``target_ptr``."""
    label = load_label(target_ptr, classes, ignore_index)
    x = tl.load(row_ptr + label.index * class_stride).to(tl.float32)
    return make_slot(x, label, share, o, scale, classes, SLOT)


@triton.jit
def load_slots(row_ptr, row, o, scale, classes, class_stride, ignore_index, mixed_row_ptr=None):
    """Return both targets of a row; the second repeats the first if there is one alone.

    mixed_row_ptr: ``row_ptr`` of the mixed target, if it is another.
    """
    share = 1.0
    if o.mixed_target_ptr is not None:
        share = tl.load(o.mix_lambda_ptr + row * o.mix_lambda_stride)
    a = load_slot(row_ptr, o.target_ptr + row, share, o, scale, classes, class_stride, ignore_index, 0)
    b = a
    if o.mixed_target_ptr is not None:
        if mixed_row_ptr is not None:
            row_ptr = mixed_row_ptr
        target_ptr = o.mixed_target_ptr + row
        b = load_slot(row_ptr, target_ptr, 1.0 - share, o, scale, classes, class_stride, ignore_index, 1)
    return a, b


# --- loss and slopes -------------------------------------------------------------------------------------------------


@triton.jit
def merge_totals(peak, mass, own, other, MIXED: tl.constexpr):
    """Return the log-sum-exp over the columns other than the slot's own and over all, both minus the peak; and the
    slot's cross-entropy."""
    others = tl.log(mass)
    if MIXED:
        separate = other.valid & (other.column != own.column)
        others = tl.where(separate, add_exp(others, other.plain - peak), others)
    excess = others - (own.shifted - peak)
    more = log1p_exp(-tl.abs(excess))
    total = tl.maximum(others, own.shifted - peak) + more
    return others, tl.where(own.valid, total, others), tl.maximum(excess, 0.0) + more


@triton.jit
def slot_loss(peak, mass, weighted, own, other, smooth_total, smooth_share, o):
    """Return the slot's term of the loss. smooth_share: see load_smooth_share."""
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    _, total, cross_entropy = merge_totals(peak, mass, own, other, MIXED)
    term = own.weight * cross_entropy
    if o.smooth:
        smooth = smooth_total * total - weighted - times_weight(own.smooth_weight, own.shifted - peak, o)
        if MIXED:
            separate = other.valid & (other.column != own.column)
            smooth -= tl.where(separate, times_weight(other.smooth_weight, other.plain - peak, o), 0.0)
        term = (1.0 - o.label_smoothing) * term + smooth_share * smooth
    return tl.where(own.valid, own.factor * term, own.factor)


@triton.jit
def row_loss(peak, mass, weighted, a, b, smooth_total, smooth_share, o):
    """Return the row's loss and log-sum-exp."""
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    loss = slot_loss(peak, mass, weighted, a, b, smooth_total, smooth_share, o)
    if MIXED:
        loss += slot_loss(peak, mass, weighted, b, a, smooth_total, smooth_share, o)
    _, total, _ = merge_totals(peak, mass, a, b, MIXED)
    return loss, peak + total


@triton.jit
def slot_slopes(peak, mass, own, other, upstream, upstream_lse, smooth_total, smooth_share, o):
    """Return d/d(v), d/d(D), s and D - peak of one slot."""
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    others, total, _ = merge_totals(peak, mass, own, other, MIXED)
    factor = tl.where(own.valid, upstream * own.factor, 0.0)
    hard = factor * (1.0 - o.label_smoothing) * own.weight
    soft = factor * smooth_share
    wrong = fast_exp(others - total)  # 1 - p without cancellation
    right = fast_exp(own.shifted - peak - total)
    dv = soft * (smooth_total * right - own.smooth_weight) + upstream_lse * right - hard * wrong
    return tl.where(own.valid, dv, 0.0), hard + soft * smooth_total + upstream_lse, soft, total


@triton.jit
def plain_gradient(peak, own, other, d_total, total, soft):
    """Return d/d(u_y) of the slot's column through the other slot's term."""
    gradient = d_total * fast_exp(own.plain - peak - total) - soft * own.smooth_weight
    return tl.where(other.valid & (other.column == own.column), 0.0, gradient)


@triton.jit
def row_slopes(peak, mass, a, b, upstream, upstream_lse, smooth_total, smooth_share, o):
    """Return the row's slopes for an upstream gradient of the loss and one of the log-sum-exp."""
    dv_a, d_total, smooth, total = slot_slopes(peak, mass, a, b, upstream, upstream_lse, smooth_total, smooth_share, o)
    slope = d_total * fast_exp(-total)
    plain_a, plain_b, dv_b = tl.zeros_like(slope), tl.zeros_like(slope), tl.zeros_like(slope)
    if o.mixed_target_ptr is not None:
        dv_b, d_total_b, smooth_b, total_b = slot_slopes(peak, mass, b, a, upstream, 0.0, smooth_total, smooth_share, o)
        plain_a = plain_gradient(peak, a, b, d_total_b, total_b, smooth_b)
        plain_b = plain_gradient(peak, b, a, d_total, total, smooth)
        slope += d_total_b * fast_exp(-total_b)
        smooth += smooth_b
    # without an ordinary column above -inf exp(-total) may overflow; NaN where nothing is finite
    slope = tl.where(mass == 0.0, d_total * (total - total), slope)
    return Slopes(slope, smooth, SlotGradient(plain_a, dv_a), SlotGradient(plain_b, dv_b))


@triton.jit
def add_shared_column(column_a, through_a, column_b, through_b):
    """Return the values of both targets' columns, each their sum where both are the same column.

    Neither is then an ordinary column of the other: their ``plain`` gradients are 0.
    """
    both = column_a == column_b
    return (
        tl.where(both, through_a + through_b, through_a),
        tl.where(both, through_a + through_b, through_b),
    )


@triton.jit
def target_gradient(a, b, slopes, o):
    """Return d/d(class_scale_y x_y) / scale in each target's column: d/d(u_y) plus the part through v."""
    through_a, through_b = slopes.a.plain + slopes.a.shifted * a.dphi_dc, slopes.b.plain
    if o.mixed_target_ptr is not None:
        through_b = slopes.b.plain + slopes.b.shifted * b.dphi_dc
        through_a, through_b = add_shared_column(a.column, through_a, b.column, through_b)
    return TargetValues(a.column, through_a, b.column, through_b)


@triton.jit
def place_targets(columns, du, targets, o):
    """Return du with the targets' values in their columns."""
    if o.mixed_target_ptr is not None:
        du = tl.where(columns == targets.column_b, targets.value_b, du)
    return tl.where(columns == targets.column_a, targets.value_a, du)


# --- maxima ----------------------------------------------------------------------------------------------------------


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    """Return the maximum along an axis, NaN where there is one."""
    if INTERPRETED:  # whose reductions are slow but for the usual ones
        nan = tl.max((x != x).to(tl.int32), axis) > 0
        return tl.where(nan, float("nan"), tl.max(tl.where(x == x, x, -INF), axis))
    else:
        return tl.reduce(x, axis, larger)


@triton.jit
def same_number(a, b):
    """Return whether a equals b, or both are NaN."""
    return tl.where(b == b, a == b, a != a)


@triton.jit
def first_best(x, columns, mask):
    """Return the maximum of x along the classes and its first column; as in torch.argmax a NaN beats every number."""
    best = tl.max(tl.where(x == x, x, -INF), 0)
    column = tl.min(tl.where(mask & (x == best), columns, NO_COLUMN), 0)
    nan_column = tl.min(tl.where(x != x, columns, NO_COLUMN), 0)
    has_nan = nan_column < NO_COLUMN
    return tl.where(has_nan, float("nan"), best), tl.where(has_nan, nan_column, column)


@triton.jit
def merge_best(best, column, other, other_column):
    """Return the better of two maxima with its column, the first column where they are equal."""
    nan, other_nan = best != best, other != other
    as_good = (other == best) | (nan & other_nan)
    replace = (other > best) | (other_nan & ~nan) | (as_good & (other_column < column))
    replace = replace & (other_nan | ~nan)
    return tl.where(replace, other, best), tl.where(replace, other_column, column)
