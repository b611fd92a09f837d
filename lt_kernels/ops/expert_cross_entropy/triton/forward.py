"""The experts' kernel: one program per sample, which visits its experts one after another.

Rows are cut into groups, a body and an edge as in ``_rows/triton_io.py``, whose arithmetic this is. All experts of a
sample share these (their rows begin at the same place within a group), the target, and the log prior.

One program reads the row of each expert once, keeps it in registers and writes its gradient: per logit (b = itemsize) b
bytes, and 2b with gradients. If registers allow, the next expert's row is on its way meanwhile. Targets and the values
of their classes are loaded once for all experts. So is the log prior; it stays in registers unless there are many
options (then it comes out of the cache for each expert). The ensemble is a second sweep over the sample's rows, which
are still in the cache.

Rows that registers do not hold are left to the rows kernel, expert by expert, and their ensemble to the fusion's kernel
(``looped.py``); so are logits whose classes are not contiguous. A loop over tiles that visits all experts of a sample
would read the prior once. But its second read, all experts' rows of every program, does not stay in L2, where one
expert's rows do; and it needs more instructions per bfloat16 logit than fit into the time that memory takes.
"""
# ruff: noqa: RUF005 (Triton knows no starred tuples)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._experts import empty_gradient, shape_of
from ..._rows.options import Slot
from ..._rows.triton_experts import row_stride
from ..._rows.triton_io import (
    best_groups,
    body_gradient,
    body_tile,
    edge_columns,
    edge_gradient,
    lane_sum,
    load_class_values,
    merge_online_lse,
    shift_logits_by,
    split_groups,
    target_groups,
    weigh,
)
from ..._rows.triton_math import (
    INF,
    NO_COLUMN,
    affine,
    fast_exp,
    finite_reference,
    first_best,
    largest,
    load_label,
    load_scale,
    load_smooth_share,
    load_smooth_total,
    make_slot,
    merge_best,
    rescale_sums,
    row_loss,
    row_slopes,
    same_number,
)
from ..._rows.triton_options import kernel_options, plain_options
from ..arguments import Arguments
from ..looped import ensemble_of
from ..looped import forward as looped
from .launch import parts_of, sweep_groups


class Biases(NamedTuple):
    """What experts add to their logits: taus[e] * log_prior + class_bias."""

    log_prior_ptr: Any  # [C]
    class_bias_ptr: Any  # [C], or [E, C] where own
    taus: Any  # E
    own: Any  # constexpr


# --- where an expert's row is, and what it adds to its logits ---------------------------------------------------------


@triton.jit
def row_begin(ptr, row, expert: tl.constexpr, expert_stride, row_stride):
    """Return where the expert's row begins."""
    return ptr + (tl.cast(expert_stride, tl.int64) * expert + row * row_stride)


@triton.jit
def body_begin(ptr, row, expert: tl.constexpr, expert_stride, row_stride, GROUP: tl.constexpr):
    """Return where the first whole group of the expert's row begins."""
    begin = tl.cast(expert_stride, tl.int64) * expert + row * row_stride
    return ptr + (begin + (GROUP - 1)) // GROUP * GROUP


@triton.jit
def load_body(logits_ptrs, row, expert: tl.constexpr, expert_stride, row_stride, offsets, mask, GROUP: tl.constexpr):
    """Load the expert's logits at these offsets of the body, as they are in memory."""
    body_ptr = body_begin(logits_ptrs[expert], row, expert, expert_stride, row_stride, GROUP)
    return tl.load(body_ptr + offsets, mask=mask, other=-INF)


@triton.jit
def locate_bias(biases, expert: tl.constexpr, classes):
    """Return where an expert's row of class_bias begins: an aligned pointer, and the columns from there."""
    offset = tl.cast(classes, tl.int64) * (expert if biases.own else 0)
    aligned = offset // 4 * 4
    return biases.class_bias_ptr + aligned, (offset - aligned).to(tl.int32)


@triton.jit
def add_bias(slot, biases, expert: tl.constexpr, classes):
    """Return a target of a row with the expert's bias added."""
    index = tl.maximum(slot.column, 0)
    bias = 0.0
    if biases.log_prior_ptr is not None:
        bias = affine(tl.load(biases.log_prior_ptr + index), biases.taus[expert], None)
    if biases.class_bias_ptr is not None:
        bias_ptr, before = locate_bias(biases, expert, classes)
        bias += tl.load(bias_ptr + before + index)
    return Slot(
        slot.column, slot.valid, slot.factor, slot.weight, slot.smooth_weight, slot.plain + bias, slot.shifted + bias,
        slot.cosine, slot.phi, slot.dphi_dc, slot.dphi_dm,
    )  # fmt: skip


@triton.jit
def load_prior(biases, first, offsets, mask, WIDE: tl.constexpr):
    """Load the log prior of these columns; a number that nothing uses if there is none."""
    prior = 0.0
    if biases.log_prior_ptr is not None:
        prior = load_class_values(biases.log_prior_ptr, first, offsets, mask, 0.0, WIDE, False)
    return prior


@triton.jit
def shift_by_biases(
    prior, x, biases, expert: tl.constexpr, first, offsets, mask, o, classes, scale, WIDE: tl.constexpr
):
    """Return u = scale * class_scale * x + class_bias + tau * prior; -inf outside the mask, where x is -inf."""
    bias = None
    if biases.log_prior_ptr is not None:
        # rounded, as is the bias that the rows kernel gets for it in backward
        bias = affine(prior, biases.taus[expert], None)
    if biases.class_bias_ptr is not None:
        bias_ptr, before = locate_bias(biases, expert, classes)
        own = load_class_values(bias_ptr, first + before, offsets, mask, 0.0, WIDE, False)
        bias = own if bias is None else bias + own
    return shift_logits_by(x, bias, first, offsets, mask, o, scale, WIDE)


@triton.jit
def load_edge(row_ptr, prior, biases, expert: tl.constexpr, edge, edge_mask, rest_mask, o, classes, scale):
    """Load a row's edge: the logits, and u where no target is, else -inf."""
    x = tl.load(row_ptr + edge, mask=edge_mask, other=-INF).to(tl.float32)
    u = shift_by_biases(prior, x, biases, expert, 0, edge, edge_mask, o, classes, scale, False)
    return x, tl.where(rest_mask, u, -INF)


# --- one expert's row ------------------------------------------------------------------------------------------------


@triton.jit
def sum_tile(u, u_edge, head, offsets, mask, edge, rest_mask, o, WIDE: tl.constexpr):
    """Return the sums over all columns that are no target: maximum (but never -inf), sum of exp(u - maximum), sum of
    w_j (u_j - maximum); and exp(u - maximum) of edge and body."""
    peak = finite_reference(tl.maximum(tl.max(u_edge, 0), tl.max(tl.max(tl.max(u, 2), 0), 0)))
    exp, exp_edge = fast_exp(u - peak), fast_exp(u_edge - peak)
    weighted = 0.0
    if o.smooth:
        weighted = tl.sum(lane_sum(weigh(u - peak, head, offsets, mask, o, WIDE)), 0)
        weighted += tl.sum(weigh(u_edge - peak, 0, edge, rest_mask, o, False), 0)
    return peak, tl.sum(lane_sum(exp), 0) + tl.sum(exp_edge, 0), weighted, exp_edge, exp


# --- the mean of the experts -----------------------------------------------------------------------------------------


@triton.jit
def load_slot_of_sum(row_ptrs, label, share, o, classes, scale, SLOT: tl.constexpr, EXPERTS: tl.constexpr):
    """Return a target of the plain cross-entropy of ``scale`` times the sum of the experts."""
    index = label.index
    total = tl.load(row_ptrs[0] + index).to(tl.float32)
    for e in tl.static_range(1, EXPERTS):
        total += tl.load(row_ptrs[e] + index).to(tl.float32)
    return make_slot(total, label, share, o, scale, classes, SLOT)


@triton.jit
def load_slots_of_sum(row_ptrs, row, o, classes, scale, ignore_index, EXPERTS: tl.constexpr):
    """Return both targets of the plain cross-entropy of ``scale`` times the sum of the experts."""
    share = 1.0
    if o.mixed_target_ptr is not None:
        share = tl.load(o.mix_lambda_ptr + row * o.mix_lambda_stride)
    label = load_label(o.target_ptr + row, classes, ignore_index)
    a = load_slot_of_sum(row_ptrs, label, share, o, classes, scale, 0, EXPERTS)
    b = a
    if o.mixed_target_ptr is not None:
        label = load_label(o.mixed_target_ptr + row, classes, ignore_index)
        b = load_slot_of_sum(row_ptrs, label, 1.0 - share, o, classes, scale, 1, EXPERTS)
    return a, b


@triton.jit
def add_bodies(logits_ptrs, row, expert_stride, row_stride, offsets, mask, GROUP: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the sum over the experts of their logits at these offsets of the bodies."""
    body_ptr = body_begin(logits_ptrs[0], row, 0, expert_stride, row_stride, GROUP)
    total = tl.load(body_ptr + offsets, mask=mask, other=-INF).to(tl.float32)
    for e in tl.static_range(1, EXPERTS):
        body_ptr = body_begin(logits_ptrs[e], row, e, expert_stride, row_stride, GROUP)
        total += tl.load(body_ptr + offsets, mask=mask, other=-INF).to(tl.float32)
    return total


@triton.jit
def sweep_sum(
    logits_ptrs, row, expert_stride, row_stride, head, groups, group_a, group_b, scale, GROUP: tl.constexpr,
    LANES: tl.constexpr, REPEAT: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Return, for each lane of the body, the maximum of z = ``scale`` times the sum over the experts and the sum of
    exp(z - maximum); and the largest z (a NaN is larger than anything) with the first group that has it."""
    peaks = tl.full([LANES], -INF, tl.float32)
    masses = tl.zeros([LANES], tl.float32)
    bests = tl.full([LANES], -INF, tl.float32)
    groups_of_bests = tl.full([LANES], NO_COLUMN, tl.int32)
    for begin in range(0, groups, REPEAT * LANES):
        group, inside, offsets, mask = body_tile(begin, groups, group_a, group_b, GROUP, LANES, REPEAT)
        z = add_bodies(logits_ptrs, row, expert_stride, row_stride, offsets, mask, GROUP, EXPERTS)
        z = tl.where(mask, affine(z, scale, None), -INF)
        peaks, masses, _, _ = merge_online_lse(z, peaks, masses, masses, masses)
        tile_bests, tile_groups = best_groups(z, group, inside)
        bests, groups_of_bests = merge_best(bests, groups_of_bests, tile_bests, tile_groups)
    return peaks, masses, bests, groups_of_bests


@triton.jit
def best_of_sum(
    logits_ptrs, row, expert_stride, row_stride, head, best, group, scale, GROUP: tl.constexpr, EXPERTS: tl.constexpr
):
    """Return the largest of the lanes' maxima and its first column, whose group is read again."""
    highest = largest(best, 0)
    first = tl.min(tl.where(same_number(best, highest), group, NO_COLUMN), 0)
    exists = first < NO_COLUMN
    offsets = tl.where(exists, first, 0) * GROUP + tl.arange(0, GROUP)
    mask = exists & (offsets >= 0)
    total = add_bodies(logits_ptrs, row, expert_stride, row_stride, offsets, mask, GROUP, EXPERTS)
    same = exists & same_number(affine(total, scale, None), highest)
    return highest, tl.min(tl.where(same, head + offsets, NO_COLUMN), 0)


@triton.jit
def write_ensemble(
    loss_ptr,  # [N]
    prediction_ptr,  # [N] int64
    logits_ptrs, row, expert_stride, row_stride, head, groups, group_a, group_b, sum_edge, edge, edge_mask, rest_mask,
    mean_a, mean_b, smooth_total, plain, mean_scale, GROUP: tl.constexpr, LANES: tl.constexpr, SWEEP: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write the cross-entropy and the prediction of the experts' mean."""
    peaks, masses, bests, groups_of_bests = sweep_sum(
        logits_ptrs, row, expert_stride, row_stride, head, groups, group_a, group_b, mean_scale, GROUP, LANES,
        SWEEP, EXPERTS,
    )  # fmt: skip
    z_edge = tl.where(edge_mask, affine(sum_edge, mean_scale, None), -INF)
    z_rest = tl.where(rest_mask, z_edge, -INF)
    peak = tl.maximum(tl.max(z_rest, 0), tl.max(peaks, 0))
    masses, _ = rescale_sums(peaks, masses, masses, masses, peak)
    peak = finite_reference(peak)
    mass = tl.sum(masses, 0) + tl.sum(fast_exp(z_rest - peak), 0)
    loss, _ = row_loss(peak, mass, 0.0, mean_a, mean_b, smooth_total, 0.0, plain)
    tl.store(loss_ptr + row, loss)
    best, column = best_of_sum(
        logits_ptrs, row, expert_stride, row_stride, head, bests, groups_of_bests, mean_scale, GROUP, EXPERTS
    )
    edge_best, edge_column = first_best(z_edge, edge, edge_mask)
    _, column = merge_best(edge_best, edge_column, best, column)
    tl.store(prediction_ptr + row, column.to(tl.int64))


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index"])
def expert_cross_entropy_forward_kernel(
    logits_ptrs,  # E of [N, C], or E times [E, N, C]; unit class stride
    o,  # KernelOptions without class_bias
    log_prior_ptr,  # [C]
    class_bias_ptr,  # [C], or [E, C] where OWN_BIAS
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
    taus,  # E
    ignore_index,
    EXPERTS: tl.constexpr,
    OWN_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    AHEAD: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """Compute the losses of a sample, one program per sample.

    A row is one tile of [REPEAT, LANES, GROUP] and an edge, and stays in registers. KEEP: so does the row of the log
    prior; AHEAD: so does the next expert's row. The ensemble is a sweep over tiles of [SWEEP, LANES, GROUP].
    """
    WIDE: tl.constexpr = GROUP >= 4
    MIXED: tl.constexpr = o.mixed_target_ptr is not None
    ENSEMBLE: tl.constexpr = ensemble_loss_ptr is not None
    biases = Biases(log_prior_ptr, class_bias_ptr, taus, OWN_BIAS)
    rows = tl.cast(tl.num_programs(0), tl.int64)
    row = tl.program_id(0).to(tl.int64)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    mean_scale = scale * (1.0 / EXPERTS)
    smooth_share = load_smooth_share(o, classes)
    smooth_total = load_smooth_total(o, classes)

    _, head, groups = split_groups(row * row_stride, classes, GROUP)
    label_a = load_label(o.target_ptr + row, classes, ignore_index)
    label_b = label_a
    share = 1.0
    if MIXED:
        label_b = load_label(o.mixed_target_ptr + row, classes, ignore_index)
        share = tl.load(o.mix_lambda_ptr + row * o.mix_lambda_stride)
    row_ptrs = ()
    own = ()  # the targets' logits, all on their way at once; what else they have is made for one expert at a time
    for e in tl.static_range(EXPERTS):
        row_ptrs = row_ptrs + (row_begin(logits_ptrs[e], row, e, expert_stride, row_stride),)
        x_a = tl.load(row_ptrs[e] + label_a.index)
        x_b = x_a
        if MIXED:
            x_b = tl.load(row_ptrs[e] + label_b.index)
        own = own + ((x_a, x_b),)
    if ENSEMBLE:
        plain = plain_options(o, ensemble_coefficient_ptr)
        mean_a, mean_b = load_slots_of_sum(row_ptrs, row, plain, classes, mean_scale, ignore_index, EXPERTS)

    group_a, group_b = target_groups(label_a.column, label_b.column, head, groups, MIXED, GROUP)
    edge, edge_mask = edge_columns(head, groups, group_a, group_b, classes, GROUP)
    rest_mask = edge_mask & (edge != label_a.column) & (edge != label_b.column)
    prior_edge = load_prior(biases, 0, edge, edge_mask, False)
    sum_edge = tl.zeros([4 * GROUP], tl.float32)

    _, _, offsets, mask = body_tile(0, groups, group_a, group_b, GROUP, LANES, REPEAT)
    if AHEAD:
        x = load_body(logits_ptrs, row, 0, expert_stride, row_stride, offsets, mask, GROUP)
    if KEEP:
        prior = load_prior(biases, head, offsets, mask, WIDE)
    for e in tl.static_range(EXPERTS):
        if not AHEAD:
            x = load_body(logits_ptrs, row, e, expert_stride, row_stride, offsets, mask, GROUP)
        x_edge, u_edge = load_edge(row_ptrs[e], prior_edge, biases, e, edge, edge_mask, rest_mask, o, classes, scale)
        sum_edge += x_edge
        if not KEEP:
            prior = load_prior(biases, head, offsets, mask, WIDE)
        u = shift_by_biases(prior, x.to(tl.float32), biases, e, head, offsets, mask, o, classes, scale, WIDE)
        if AHEAD and e + 1 < EXPERTS:  # on its way while this one is summed up and written
            x = load_body(logits_ptrs, row, e + 1, expert_stride, row_stride, offsets, mask, GROUP)
        peak, mass, weighted, exp_edge, exp = sum_tile(u, u_edge, head, offsets, mask, edge, rest_mask, o, WIDE)
        x_a, x_b = own[e]
        a = add_bias(make_slot(x_a.to(tl.float32), label_a, share, o, scale, classes, 0), biases, e, classes)
        b = a
        if MIXED:
            b = make_slot(x_b.to(tl.float32), label_b, 1.0 - share, o, scale, classes, 1)
            b = add_bias(b, biases, e, classes)
        if grad_ptr is not None:
            grad_row_ptr = row_begin(grad_ptr, row, e, grad_expert_stride, grad_row_stride)
            grad_body_ptr = body_begin(grad_ptr, row, e, grad_expert_stride, grad_row_stride, GROUP)
        loss_row_ptr, rest_row_ptr = loss_ptr + e * rows + row, rest_ptr + 2 * e * rows + row
        loss, _ = row_loss(peak, mass, weighted, a, b, smooth_total, smooth_share, o)
        tl.store(loss_row_ptr, loss)
        tl.store(rest_row_ptr, peak)
        tl.store(rest_row_ptr + rows, mass)
        if grad_ptr is not None:
            slopes = row_slopes(peak, mass, a, b, 1.0, 0.0, smooth_total, smooth_share, o)
            dx = edge_gradient(exp_edge, exp_edge, a, b, slopes, edge, edge_mask, o, scale)
            tl.store(grad_row_ptr + edge, dx.to(grad_ptr.dtype.element_ty), mask=edge_mask)
            dx = body_gradient(exp, exp, slopes, head, offsets, mask, o, scale, WIDE)
            tl.store(grad_body_ptr + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
    if ENSEMBLE:
        write_ensemble(
            ensemble_loss_ptr, ensemble_prediction_ptr, logits_ptrs, row, expert_stride, row_stride, head,
            groups, group_a, group_b, sum_edge, edge, edge_mask, rest_mask, mean_a, mean_b, smooth_total, plain,
            mean_scale, GROUP, LANES, SWEEP, EXPERTS,
        )  # fmt: skip


# --- launcher --------------------------------------------------------------------------------------------------------


def forward(a: Arguments, with_ensemble: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results of ``op.py``."""
    experts, n, _ = shape_of(a.logits)
    first = a.logits[0]
    outputs = [empty_gradient(a.logits)] if with_grad else []
    parts = parts_of(a, outputs) if n > 0 else []
    if parts is None:
        del outputs
        return looped(a, with_ensemble, with_grad, "triton")
    loss = first.new_empty((experts, n), dtype=torch.float32)
    rest = loss.new_empty((experts, 2, n))
    ensemble_loss = loss.new_empty((n if with_ensemble else 0,))
    prediction = loss.new_empty((n if with_ensemble else 0,), dtype=torch.int64)
    ensemble = with_ensemble and len(parts) == 1
    log_prior, class_bias, taus = a.log_prior, a.options.class_bias, a.taus
    if log_prior is None and class_bias is not None and class_bias.dim() == 1:
        log_prior, class_bias, taus = class_bias, None, [1.0] * experts  # a bias of all is a prior with taus of 1
    own_biases = class_bias if class_bias is not None and class_bias.dim() == 2 else None
    options = kernel_options(a.options._replace(class_bias=None))
    with torch.cuda.device_of(first):
        for which, layout, (launch, keep, ahead) in parts:
            grad = outputs[0][which] if with_grad else None
            arguments: dict[str, Any] = {
                "logits_ptrs": layout.tensors,
                "o": options,
                "log_prior_ptr": log_prior,
                "class_bias_ptr": class_bias if own_biases is None else own_biases[which],
                "ensemble_coefficient_ptr": a.ensemble_coefficient if ensemble else None,
                "loss_ptr": loss[which],
                "rest_ptr": rest[which],
                "ensemble_loss_ptr": ensemble_loss if ensemble else None,
                "ensemble_prediction_ptr": prediction if ensemble else None,
                "grad_ptr": grad,
                "classes": first.shape[-1],
                "ignore_index": a.options.ignore_index,
                "expert_stride": layout.expert_stride,
                "row_stride": layout.row_stride,
                "grad_expert_stride": 0 if grad is None else grad.stride(0),
                "grad_row_stride": 0 if grad is None else row_stride(grad),
                "taus": tuple(taus[which]),
            }
            expert_cross_entropy_forward_kernel[(n,)](
                **arguments,
                EXPERTS=len(layout.tensors),
                OWN_BIAS=own_biases is not None,
                KEEP=keep and log_prior is not None and class_bias is None,
                AHEAD=ahead,
                SWEEP=sweep_groups(launch),
                **launch.constants,
            )
    if with_ensemble and not ensemble and n > 0:
        ensemble_loss, prediction = ensemble_of(a, "triton")
    return loss, rest, ensemble_loss, prediction, outputs[0] if with_grad else first.new_empty((0,))
