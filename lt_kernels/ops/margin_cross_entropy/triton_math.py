# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""One row's scalars, and the arithmetic of its columns: what the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .._triton import interpreting

_INTERPRETED = tl.constexpr(interpreting())

#: Position of the axis REPEAT in tiles [REPEAT, LANES, contiguous] (or [LANES, REPEAT, contiguous]): Triton spreads
#: threads over the later of the first two axes, until 3.6 over the earlier; REPEAT must be the other one.
_REPEAT_AXIS = tl.constexpr(0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 1)

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
def _affine(x, a, b):
    """a x + b (b: 0 if None) with one rounding: how every kernel has its u. Left to itself the compiler fuses a product
    with whatever is added next, in one kernel with the bias and in another with -peak; where |u| is some hundred, an
    exponential would then be off by what u was rounded by in the kernel that found the peak."""
    return tl.fma(x, a, 0.0 if b is None else b)


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
def _class(target_ptr, classes, ignore_index):
    """A row's class index, whether it is not ignored, and its column: -1 where there is none."""
    target = tl.load(target_ptr)
    valid = target != ignore_index
    known = valid & (target >= 0) & (target < classes)
    return tl.where(known, target, 0), valid, tl.where(known, target, -1).to(tl.int32)


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
    """One target of a row."""
    index, valid, column = _class(target_ptr, classes, ignore_index)
    x = tl.load(row_ptr + index * class_stride).to(tl.float32)
    return _slot_of(
        x, index, valid, column, share, coefficient_ptr, weight_ptr, class_bias_ptr, class_scale_ptr, margin_ptr,
        classes, scale, margin, cos_margin, sin_margin, SLOT, ANGULAR,
    )  # fmt: skip


@triton.jit
def _slot_of(
    x, index, valid, column, share, coefficient_ptr, weight_ptr, class_bias_ptr, class_scale_ptr, margin_ptr, classes,
    scale, margin, cos_margin, sin_margin, SLOT: tl.constexpr, ANGULAR: tl.constexpr,
):  # fmt: skip
    """One target of a row from its logit x and what _class says. A class out of range makes its logits NaN."""
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
    plain = _affine(x, scale * class_scale, bias)
    shifted = _affine(phi, scale, bias)
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
    mixed_row_ptr=None,  # row_ptr of the mixed target, if it is another
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
        if mixed_row_ptr is not None:
            row_ptr = mixed_row_ptr
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
    bias = None
    if class_bias_ptr is not None:
        bias = _class_values(class_bias_ptr, first, offsets, mask, 0.0, WIDE, False)
    return _shifted_with(x, bias, first, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)


@triton.jit
def _shifted_with(x, bias, first, offsets, mask, class_scale_ptr, scale, HAS_SCALE: tl.constexpr, WIDE: tl.constexpr):
    """The same of a bias that has been loaded, None for none."""
    if class_scale_ptr is not None:
        u = _affine(x, scale * _class_values(class_scale_ptr, first, offsets, mask, 1.0, WIDE, False), bias)
        u = tl.where(mask, u, -_INF)  # -inf times what is not positive
    elif HAS_SCALE:
        u = tl.where(mask, _affine(x, scale, bias), -_INF)
    else:
        u = x if bias is None else x + bias
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
def _through(a, b, plain_a, dv_a, plain_b, dv_b, MIXED: tl.constexpr):
    """d/d(class_scale_y x_y) / scale in each target's column: d/d(u_y) plus what reaches it through v."""
    column_a, _, _, _, _, _, _, dphi_dc_a, _ = a
    column_b, _, _, _, _, _, _, dphi_dc_b, _ = b
    through_a, through_b = plain_a + dv_a * dphi_dc_a, plain_b
    if MIXED:
        through_b = plain_b + dv_b * dphi_dc_b
        both = column_a == column_b  # then neither is an ordinary column of the other: plain is 0
        through_a, through_b = (
            tl.where(both, through_a + through_b, through_a),
            tl.where(both, through_a + through_b, through_b),
        )
    return column_a, through_a, column_b, through_b


@triton.jit
def _at_targets(columns, du, column_a, through_a, column_b, through_b, MIXED: tl.constexpr):
    """du, but ``through`` in the targets' columns."""
    if MIXED:
        du = tl.where(columns == column_b, through_b, du)
    return tl.where(columns == column_a, through_a, du)


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
def _repeated(begin, REPEAT: tl.constexpr, LANES: tl.constexpr):
    """begin, begin + 1, ...: [REPEAT, LANES]."""
    if _REPEAT_AXIS == 0:
        return begin + tl.arange(0, REPEAT)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    else:
        return begin + tl.arange(0, REPEAT)[None, :] * LANES + tl.arange(0, LANES)[:, None]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x, axis: tl.constexpr):
    """Maximum along an axis, NaN where there is one."""
    if _INTERPRETED:  # whose reductions are slow but for the usual ones
        nan = tl.max((x != x).to(tl.int32), axis) > 0
        return tl.where(nan, float("nan"), tl.max(tl.where(x == x, x, -_INF), axis))
    else:
        return tl.reduce(x, axis, _larger)


@triton.jit
def _same(a, b):
    return tl.where(b == b, a == b, a != a)


@triton.jit
def _reference(peak):
    """What exponentials are taken relative to: never -inf."""
    return tl.where(peak == -_INF, 0.0, peak)


@triton.jit
def _joined(peak, mass, weighted, visited, common):
    """mass and weighted, sums relative to ``peak``, relative to the larger ``common``."""
    below = _reference(peak) - _reference(common)
    return mass * _exp(tl.minimum(below, 0.0)), weighted + visited * below


@triton.jit
def _groups(offset, classes, GROUP: tl.constexpr):
    """Of a row that starts at ``offset``: its first aligned element, the columns before it, and its whole groups."""
    aligned = (offset + (GROUP - 1)) // GROUP * GROUP
    head = tl.minimum((aligned - offset).to(tl.int32), classes)
    return aligned, head, (classes - head) // GROUP


@triton.jit
def _group_of(column, head, groups, GROUP: tl.constexpr):
    """The whole group that holds the column, -1 if none does."""
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
