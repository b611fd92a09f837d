# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton knows no starred tuples)
"""The experts' kernel: one program per sample, which visits its experts one after another.

Rows are cut into groups, a body and an edge as in the rows kernels of ``margin_cross_entropy``, whose arithmetic this
is. All experts of a sample share these (their rows begin at the same place within a group), the target, and the log
prior.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..margin_cross_entropy.triton_math import (
    _INF,
    _NO_COLUMN,
    _affine,
    _at_targets,
    _best,
    _better,
    _class,
    _class_values,
    _edge,
    _exp,
    _full_scale,
    _group_of,
    _groups,
    _joined,
    _largest,
    _loss,
    _ordinary,
    _reference,
    _same,
    _shifted_with,
    _slopes,
    _slot_of,
    _through,
    _unscaled,
    _weight_total,
    _weighted,
)
from ..margin_cross_entropy.triton_rows import _best_groups, _grown, _lane_sum, _tile

# --- where an expert's row is, and what it adds to its logits ---------------------------------------------------------


@triton.jit
def _row(ptr, row, expert: tl.constexpr, expert_stride, row_stride):
    """Where the expert's row begins."""
    return ptr + (tl.cast(expert_stride, tl.int64) * expert + row * row_stride)


@triton.jit
def _body(ptr, row, expert: tl.constexpr, expert_stride, row_stride, GROUP: tl.constexpr):
    """Where its first whole group does."""
    begin = tl.cast(expert_stride, tl.int64) * expert + row * row_stride
    return ptr + (begin + (GROUP - 1)) // GROUP * GROUP


@triton.jit
def _loaded_body(logits_ptrs, row, expert: tl.constexpr, expert_stride, row_stride, offsets, mask, GROUP: tl.constexpr):
    """The expert's logits at these offsets from there, as they are in memory."""
    body_ptr = _body(logits_ptrs[expert], row, expert, expert_stride, row_stride, GROUP)
    return tl.load(body_ptr + offsets, mask=mask, other=-_INF)


@triton.jit
def _bias_of(class_bias_ptr, expert: tl.constexpr, classes, OWN_BIAS: tl.constexpr):
    """Where an expert's row of class_bias begins: an aligned pointer, and the columns from there."""
    offset = tl.cast(classes, tl.int64) * (expert if OWN_BIAS else 0)
    aligned = offset // 4 * 4
    return class_bias_ptr + aligned, (offset - aligned).to(tl.int32)


@triton.jit
def _with_bias(slot, expert: tl.constexpr, tau, log_prior_ptr, class_bias_ptr, classes, OWN_BIAS: tl.constexpr):
    """A target of a row of which _slot does not know the bias."""
    column, valid, factor, weight, plain, shifted, phi, dphi_dc, dphi_dm = slot
    index = tl.maximum(column, 0)
    bias = 0.0
    if log_prior_ptr is not None:
        bias = _affine(tl.load(log_prior_ptr + index), tau, None)
    if class_bias_ptr is not None:
        bias_ptr, before = _bias_of(class_bias_ptr, expert, classes, OWN_BIAS)
        bias += tl.load(bias_ptr + before + index)
    return column, valid, factor, weight, plain + bias, shifted + bias, phi, dphi_dc, dphi_dm


@triton.jit
def _prior(log_prior_ptr, first, offsets, mask, WIDE: tl.constexpr):
    """The log prior of these columns; nothing of use if there is none."""
    prior = 0.0
    if log_prior_ptr is not None:
        prior = _class_values(log_prior_ptr, first, offsets, mask, 0.0, WIDE, False)
    return prior


@triton.jit
def _shifted_by(
    prior, x, expert: tl.constexpr, tau, first, offsets, mask, log_prior_ptr, class_bias_ptr, class_scale_ptr, classes,
    scale, HAS_SCALE: tl.constexpr, OWN_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """u = scale * class_scale * x + class_bias + tau * prior; -inf outside the mask, where x is -inf."""
    bias = None
    if log_prior_ptr is not None:
        bias = _affine(prior, tau, None)  # rounded, as is the bias that the rows kernel gets for it in backward
    if class_bias_ptr is not None:
        bias_ptr, before = _bias_of(class_bias_ptr, expert, classes, OWN_BIAS)
        own = _class_values(bias_ptr, first + before, offsets, mask, 0.0, WIDE, False)
        bias = own if bias is None else bias + own
    return _shifted_with(x, bias, first, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)


@triton.jit
def _edge_of(
    row_ptr, prior, expert: tl.constexpr, tau, edge, edge_mask, rest_mask, log_prior_ptr, class_bias_ptr,
    class_scale_ptr, classes, scale, HAS_SCALE: tl.constexpr, OWN_BIAS: tl.constexpr,
):  # fmt: skip
    """Of a row's edge: the logits, and u where no target is, else -inf."""
    x = tl.load(row_ptr + edge, mask=edge_mask, other=-_INF).to(tl.float32)
    u = _shifted_by(
        prior, x, expert, tau, 0, edge, edge_mask, log_prior_ptr, class_bias_ptr, class_scale_ptr, classes, scale,
        HAS_SCALE, OWN_BIAS, False,
    )  # fmt: skip
    return x, tl.where(rest_mask, u, -_INF)


# --- one expert's row, or that of the mean ---------------------------------------------------------------------------


@triton.jit
def _of_tile(u, u_edge, head, offsets, mask, edge, rest_mask, weight_ptr, SMOOTH: tl.constexpr, WIDE: tl.constexpr):
    """Over all columns that are no target: maximum (but never -inf), sum of exp(u - maximum), sum of
    w_j (u_j - maximum); and exp(u - maximum) of edge and body."""
    peak = _reference(tl.maximum(tl.max(u_edge, 0), tl.max(tl.max(tl.max(u, 2), 0), 0)))
    exp, exp_edge = _exp(u - peak), _exp(u_edge - peak)
    weighted = 0.0
    if SMOOTH:
        weighted = tl.sum(_lane_sum(_weighted(u - peak, head, offsets, mask, weight_ptr, WIDE)), 0)
        weighted += tl.sum(_weighted(u_edge - peak, 0, edge, rest_mask, weight_ptr, False), 0)
    return peak, tl.sum(_lane_sum(exp), 0) + tl.sum(exp_edge, 0), weighted, exp_edge, exp


@triton.jit
def _finished(
    loss_ptr,  # the row's
    rest_ptr,  # the row's
    grad_row_ptr,  # the row's first
    peak, mass, weighted, exp_edge, a, b, edge, edge_mask, rows, weight_ptr, class_scale_ptr, weight_total, scale,
    label_smoothing, smooth_share, MIXED: tl.constexpr, HAS_SCALE: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Store what is known of a row when its statistics are; of its gradient the edge. Returns slope and smooth."""
    loss, _ = _loss(peak, mass, weighted, a, b, weight_total, label_smoothing, smooth_share, MIXED, SMOOTH)
    tl.store(loss_ptr, loss)
    tl.store(rest_ptr, peak)
    tl.store(rest_ptr + rows, mass)
    slope, smooth = mass, mass  # not used
    if grad_row_ptr is not None:
        slope, smooth, plain_a, dv_a, plain_b, dv_b = _slopes(
            peak, mass, a, b, 1.0, 0.0, weight_total, label_smoothing, smooth_share, MIXED
        )
        du = _ordinary(exp_edge, slope, smooth, exp_edge, 0, edge, edge_mask, weight_ptr, SMOOTH, False, False)
        column_a, through_a, column_b, through_b = _through(a, b, plain_a, dv_a, plain_b, dv_b, MIXED)
        du = _at_targets(edge, du, column_a, through_a, column_b, through_b, MIXED)
        dx = _unscaled(du, 0, edge, edge_mask, class_scale_ptr, scale, HAS_SCALE, False)
        tl.store(grad_row_ptr + edge, dx.to(grad_row_ptr.dtype.element_ty), mask=edge_mask)
    return slope, smooth


# --- the mean of the experts -----------------------------------------------------------------------------------------


@triton.jit
def _slot_of_sum(
    row_ptrs,
    target_ptr,
    share,
    coefficient_ptr,
    classes,
    scale,
    ignore_index,
    SLOT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    index, valid, column = _class(target_ptr, classes, ignore_index)
    total = tl.load(row_ptrs[0] + index).to(tl.float32)
    for e in tl.static_range(1, EXPERTS):
        total += tl.load(row_ptrs[e] + index).to(tl.float32)
    total = tl.where(scale * total == _INF, float("nan"), total)  # as in log_softmax
    return _slot_of(
        total, index, valid, column, share, coefficient_ptr, None, None, None, None, classes, scale, 0.0, 1.0, 0.0,
        SLOT, False,
    )  # fmt: skip


@triton.jit
def _slots_of_sum(
    row_ptrs, row, target_ptr, mixed_target_ptr, mix_lambda_ptr, coefficient_ptr, classes, mix_lambda_stride, scale,
    ignore_index, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Both targets as _slots has them, for the plain cross-entropy of ``scale`` times the sum of the experts."""
    share = 1.0
    if mixed_target_ptr is not None:
        share = tl.load(mix_lambda_ptr + row * mix_lambda_stride)
    a = _slot_of_sum(row_ptrs, target_ptr + row, share, coefficient_ptr, classes, scale, ignore_index, 0, EXPERTS)
    b = a
    if mixed_target_ptr is not None:
        b = _slot_of_sum(
            row_ptrs, mixed_target_ptr + row, 1.0 - share, coefficient_ptr, classes, scale, ignore_index, 1, EXPERTS
        )
    return a, b


@triton.jit
def _sum_of_bodies(
    logits_ptrs, row, expert_stride, row_stride, offsets, mask, GROUP: tl.constexpr, EXPERTS: tl.constexpr
):
    """Sum over the experts of their logits at these offsets of the bodies."""
    body_ptr = _body(logits_ptrs[0], row, 0, expert_stride, row_stride, GROUP)
    total = tl.load(body_ptr + offsets, mask=mask, other=-_INF).to(tl.float32)
    for e in tl.static_range(1, EXPERTS):
        body_ptr = _body(logits_ptrs[e], row, e, expert_stride, row_stride, GROUP)
        total += tl.load(body_ptr + offsets, mask=mask, other=-_INF).to(tl.float32)
    return total


@triton.jit
def _sweep_of_sum(
    logits_ptrs, row, expert_stride, row_stride, head, groups, group_a, group_b, scale, GROUP: tl.constexpr,
    LANES: tl.constexpr, REPEAT: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Of each lane of the body: maximum of z, ``scale`` times the sum over the experts, and sum of exp(z - maximum);
    the largest z, where a NaN is larger than anything, and the first group that has it."""
    peaks = tl.full([LANES], -_INF, tl.float32)
    masses = tl.zeros([LANES], tl.float32)
    bests = tl.full([LANES], -_INF, tl.float32)
    best_groups = tl.full([LANES], _NO_COLUMN, tl.int32)
    for begin in range(0, groups, REPEAT * LANES):
        group, inside, offsets, mask = _tile(begin, groups, group_a, group_b, GROUP, LANES, REPEAT)
        z = _sum_of_bodies(logits_ptrs, row, expert_stride, row_stride, offsets, mask, GROUP, EXPERTS)
        z = tl.where(mask, _affine(z, scale, None), -_INF)
        peaks, masses, _, _ = _grown(z, peaks, masses, masses, masses)
        tile_bests, tile_groups = _best_groups(z, group, inside)
        bests, best_groups = _better(bests, best_groups, tile_bests, tile_groups)
    return peaks, masses, bests, best_groups


@triton.jit
def _best_of_sum(
    logits_ptrs, row, expert_stride, row_stride, head, best, group, scale, GROUP: tl.constexpr, EXPERTS: tl.constexpr
):
    """Of the lanes' maxima the largest and its first column, whose group is read again."""
    highest = _largest(best, 0)
    first = tl.min(tl.where(_same(best, highest), group, _NO_COLUMN), 0)
    exists = first < _NO_COLUMN
    offsets = tl.where(exists, first, 0) * GROUP + tl.arange(0, GROUP)
    mask = exists & (offsets >= 0)
    total = _sum_of_bodies(logits_ptrs, row, expert_stride, row_stride, offsets, mask, GROUP, EXPERTS)
    same = exists & _same(_affine(total, scale, None), highest)
    return highest, tl.min(tl.where(same, head + offsets, _NO_COLUMN), 0)


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index"])
def _experts_forward_kernel(
    logits_ptrs,  # E of [N, C], or E times [E, N, C]; unit class stride
    target_ptr,  # [N] int64
    mixed_target_ptr,  # [N] int64
    mix_lambda_ptr,  # 0-dim or [N]
    weight_ptr,  # [C]
    weight_total_ptr,  # 0-dim
    log_prior_ptr,  # [C]
    class_bias_ptr,  # [C], or [E, C] where OWN_BIAS
    class_scale_ptr,  # [C]
    margin_ptr,  # [C], or [3, C] where ANGULAR: margin, cosine, sine
    learned_scale_ptr,  # 0-dim
    coefficient_ptr,  # [1 or 2]
    ensemble_coefficient_ptr,  # [1 or 2]
    loss_ptr,  # [E, N]
    rest_ptr,  # [E, 2, N]
    ensemble_loss_ptr,  # [N]
    ensemble_prediction_ptr,  # [N] int64
    grad_ptr,  # [E, N, C], unit class stride
    classes,
    expert_stride,  # from logits_ptrs[e]: e of these to expert e
    row_stride,
    grad_expert_stride,
    grad_row_stride,
    mix_lambda_stride,
    taus,  # E
    scale,
    margin,
    cos_margin,
    sin_margin,
    ignore_index,
    label_smoothing,
    EXPERTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ANGULAR: tl.constexpr,
    SMOOTH: tl.constexpr,
    OWN_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    AHEAD: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """A row is one tile of [REPEAT, LANES, GROUP] and an edge, and stays in registers; KEEP: beside that of the log
    prior; AHEAD: beside that of the next expert. The ensemble is a sweep over tiles of [SWEEP, LANES, GROUP]."""
    WIDE: tl.constexpr = GROUP >= 4
    MIXED: tl.constexpr = mixed_target_ptr is not None
    ENSEMBLE: tl.constexpr = ensemble_loss_ptr is not None
    rows = tl.cast(tl.num_programs(0), tl.int64)
    row = tl.program_id(0).to(tl.int64)
    scale = _full_scale(scale, learned_scale_ptr)
    mean_scale = scale * (1.0 / EXPERTS)
    smooth_share = label_smoothing / classes
    weight_total = _weight_total(weight_total_ptr, classes)

    _, head, groups = _groups(row * row_stride, classes, GROUP)
    index_a, valid_a, column_a = _class(target_ptr + row, classes, ignore_index)
    index_b, valid_b, column_b = index_a, valid_a, column_a
    share = 1.0
    if MIXED:
        index_b, valid_b, column_b = _class(mixed_target_ptr + row, classes, ignore_index)
        share = tl.load(mix_lambda_ptr + row * mix_lambda_stride)
    row_ptrs = ()
    own = ()  # the targets' logits, all on their way at once; what else they have is made for one expert at a time
    for e in tl.static_range(EXPERTS):
        row_ptrs = row_ptrs + (_row(logits_ptrs[e], row, e, expert_stride, row_stride),)
        x_a = tl.load(row_ptrs[e] + index_a)
        x_b = x_a
        if MIXED:
            x_b = tl.load(row_ptrs[e] + index_b)
        own = own + ((x_a, x_b),)
    if ENSEMBLE:
        mean_a, mean_b = _slots_of_sum(
            row_ptrs, row, target_ptr, mixed_target_ptr, mix_lambda_ptr, ensemble_coefficient_ptr, classes,
            mix_lambda_stride, mean_scale, ignore_index, EXPERTS,
        )  # fmt: skip

    group_a, group_b = _group_of(column_a, head, groups, GROUP), -1
    if MIXED:
        group_b = _group_of(column_b, head, groups, GROUP)
        group_b = tl.where(group_b == group_a, -1, group_b)
    edge, edge_mask = _edge(head, groups, group_a, group_b, classes, GROUP)
    rest_mask = edge_mask & (edge != column_a) & (edge != column_b)
    prior_edge = _prior(log_prior_ptr, 0, edge, edge_mask, False)
    sum_edge = tl.zeros([4 * GROUP], tl.float32)

    _, _, offsets, mask = _tile(0, groups, group_a, group_b, GROUP, LANES, REPEAT)
    if AHEAD:
        x = _loaded_body(logits_ptrs, row, 0, expert_stride, row_stride, offsets, mask, GROUP)
    if KEEP:
        prior = _prior(log_prior_ptr, head, offsets, mask, WIDE)
    for e in tl.static_range(EXPERTS):
        if not AHEAD:
            x = _loaded_body(logits_ptrs, row, e, expert_stride, row_stride, offsets, mask, GROUP)
        x_edge, u_edge = _edge_of(
            row_ptrs[e], prior_edge, e, taus[e], edge, edge_mask, rest_mask, log_prior_ptr, class_bias_ptr,
            class_scale_ptr, classes, scale, HAS_SCALE, OWN_BIAS,
        )  # fmt: skip
        sum_edge += x_edge
        if not KEEP:
            prior = _prior(log_prior_ptr, head, offsets, mask, WIDE)
        u = _shifted_by(
            prior, x.to(tl.float32), e, taus[e], head, offsets, mask, log_prior_ptr, class_bias_ptr, class_scale_ptr,
            classes, scale, HAS_SCALE, OWN_BIAS, WIDE,
        )  # fmt: skip
        if AHEAD and e + 1 < EXPERTS:  # on its way while this one is summed up and written
            x = _loaded_body(logits_ptrs, row, e + 1, expert_stride, row_stride, offsets, mask, GROUP)
        peak, mass, weighted, exp_edge, exp = _of_tile(
            u, u_edge, head, offsets, mask, edge, rest_mask, weight_ptr, SMOOTH, WIDE
        )
        x_a, x_b = own[e]
        a = _slot_of(
            x_a.to(tl.float32), index_a, valid_a, column_a, share, coefficient_ptr, weight_ptr, None, class_scale_ptr,
            margin_ptr, classes, scale, margin, cos_margin, sin_margin, 0, ANGULAR,
        )  # fmt: skip
        a = _with_bias(a, e, taus[e], log_prior_ptr, class_bias_ptr, classes, OWN_BIAS)
        b = a
        if MIXED:
            b = _slot_of(
                x_b.to(tl.float32), index_b, valid_b, column_b, 1.0 - share, coefficient_ptr, weight_ptr, None,
                class_scale_ptr, margin_ptr, classes, scale, margin, cos_margin, sin_margin, 1, ANGULAR,
            )  # fmt: skip
            b = _with_bias(b, e, taus[e], log_prior_ptr, class_bias_ptr, classes, OWN_BIAS)
        grad_row_ptr = None
        if grad_ptr is not None:
            grad_row_ptr = _row(grad_ptr, row, e, grad_expert_stride, grad_row_stride)
            grad_body_ptr = _body(grad_ptr, row, e, grad_expert_stride, grad_row_stride, GROUP)
        slope, smooth = _finished(
            loss_ptr + e * rows + row, rest_ptr + 2 * e * rows + row, grad_row_ptr, peak, mass, weighted, exp_edge,
            a, b, edge, edge_mask, rows, weight_ptr, class_scale_ptr, weight_total, scale, label_smoothing,
            smooth_share, MIXED, HAS_SCALE, SMOOTH,
        )  # fmt: skip
        if grad_ptr is not None:
            du = _ordinary(exp, slope, smooth, exp, head, offsets, mask, weight_ptr, SMOOTH, False, WIDE)
            dx = _unscaled(du, head, offsets, mask, class_scale_ptr, scale, HAS_SCALE, WIDE)
            tl.store(grad_body_ptr + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
    if ENSEMBLE:
        peaks, masses, bests, best_groups = _sweep_of_sum(
            logits_ptrs, row, expert_stride, row_stride, head, groups, group_a, group_b, mean_scale, GROUP, LANES,
            SWEEP, EXPERTS,
        )  # fmt: skip
        z_edge = tl.where(edge_mask, _affine(sum_edge, mean_scale, None), -_INF)
        z_rest = tl.where(rest_mask, z_edge, -_INF)
        peak = tl.maximum(tl.max(z_rest, 0), tl.max(peaks, 0))
        masses, _ = _joined(peaks, masses, masses, masses, peak)
        peak = _reference(peak)
        mass = tl.sum(masses, 0) + tl.sum(_exp(z_rest - peak), 0)
        loss, _ = _loss(peak, mass, 0.0, mean_a, mean_b, weight_total, 0.0, 0.0, MIXED, False)
        tl.store(ensemble_loss_ptr + row, loss)
        best, column = _best_of_sum(
            logits_ptrs, row, expert_stride, row_stride, head, bests, best_groups, mean_scale, GROUP, EXPERTS
        )
        edge_best, edge_column = _best(z_edge, edge, edge_mask)
        _, column = _better(edge_best, edge_column, best, column)
        tl.store(ensemble_prediction_ptr + row, column.to(tl.int64))
