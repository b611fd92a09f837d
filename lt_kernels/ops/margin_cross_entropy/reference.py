"""The rows kernel in eager PyTorch: the definition that the other backends are held to.

Of a row with logits x (MATH: s = x given, so a = 1):

    u_j = scale * class_scale_j * x_j + class_bias_j                     every column
    v_t = scale * phi(class_scale_y * x_y, margin_y) + class_bias_y      the column y of target t
          phi(c, m) = c - m (additive), or cos(arccos(c) + m) (angular; c - m sin m once arccos(c) > pi - m)
    D_t = log[ exp(v_t) + sum over j != y of exp(u_j) ]
    loss = sum over targets t of
           h_t (D_t - v_t) + s_t sum_j w_j (D_t - u_j)                   with v_t in place of u_y
    h_t = k_t (1 - smoothing) w_y,   s_t = k_t smoothing / C,   k_t = coefficient_t * (lambda | 1 - lambda); ignored: 0

D_t - v_t is softplus(L_t - v_t) with L_t the log-sum-exp of the columns other than y, and the target's gradient is
built from exp(L_t - D_t), so neither cancels when a row is nearly right. Class probabilities q have no special column:

    loss = k sum_j w_j ((1 - smoothing) q_j + smoothing / C) (D - u_j)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Arguments

_SIN2_MIN = 1e-7  # keeps the angular derivative cot(theta) finite at theta = 0


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


class _Slot(NamedTuple):
    """One target of every row; each field [N, K]."""

    column: Tensor  # class, 0 where there is none
    valid: Tensor  # bool: not ignored
    factor: Tensor  # k_t; where ignored 0, or NaN if the mean is over no weight at all, as in torch
    weight: Tensor  # w_y
    plain: Tensor  # u_y
    shifted: Tensor  # v_t
    cosine: Tensor  # class_scale_y * x_y
    phi: Tensor
    dphi_dc: Tensor
    dphi_dm: Tensor


class _Rows:
    """Everything forward and backward share: shifted logits u [N, C, K] and the targets' terms."""

    def __init__(self, a: Arguments) -> None:
        self.x = a.input.to(a.compute_dtype)
        n, classes, k = a.input.shape
        ones = self.x.new_ones(classes)
        self.classes, self.angular, self.smoothing = classes, a.angular, a.label_smoothing
        self.scale = self.x.new_tensor(a.scale) if a.learned_scale is None else a.scale * a.learned_scale
        self.class_scale = ones if a.class_scale is None else a.class_scale
        self.class_bias = torch.zeros_like(ones) if a.class_bias is None else a.class_bias
        self.margin = torch.full_like(ones, a.margin) if a.class_margin is None else a.class_margin + a.margin
        self.weight = ones if a.weight is None else a.weight
        self.u = (self.scale * self.class_scale)[:, None] * self.x + self.class_bias[:, None]

        factor = self.x.new_ones(2) if a.coefficient is None else a.coefficient
        self.factor = factor[0]
        self.q: Tensor | None = None
        self.slots: list[_Slot] = []
        if a.target.is_floating_point():
            self.q = a.target.to(a.compute_dtype)
        elif a.mixed_target is None:
            self.slots = [self._slot("target", a.target, factor[0].expand(n, k), a.ignore_index)]
        else:
            assert a.mix_lambda is not None
            share = a.mix_lambda.to(a.compute_dtype).expand(n, k)
            self.slots = [
                self._slot("target", a.target, factor[0] * share, a.ignore_index),
                self._slot("mixed_target", a.mixed_target, factor[1] * (1 - share), a.ignore_index),
            ]

    def _slot(self, name: str, target: Tensor, factor: Tensor, ignore_index: int) -> _Slot:
        valid = target != ignore_index
        bad = valid & ((target < 0) | (target >= self.classes))
        if target.device.type == "cpu" and bool(bad.any()):
            row = int(bad.flatten().nonzero()[0])
            raise IndexError(
                f"{name}: row {row} has class {int(target.flatten()[row])}, "
                f"expected 0 <= class < {self.classes} or ignore_index={ignore_index}"
            )
        factor = torch.where(valid, factor, 0 * factor).masked_fill(bad, math.nan)
        index = target.masked_fill(~valid | bad, 0)
        cosine = self.class_scale[index] * self.x.gather(1, index[:, None])[:, 0]
        m = self.margin[index]
        if self.angular:
            sin2 = 1 - cosine.square()
            rotated = cosine * m.cos() - sin2.clamp_min(0).sqrt() * m.sin()
            beyond = cosine < -m.cos()  # theta > pi - m
            phi = torch.where(beyond, cosine - m * m.sin(), rotated)
            sin = sin2.clamp_min(_SIN2_MIN).sqrt()
            dphi_dc = torch.where(beyond, torch.ones_like(m), m.cos() + cosine * m.sin() / sin)
            dphi_dm = torch.where(
                beyond, -(m.sin() + m * m.cos()), -(sin2.clamp_min(0).sqrt() * m.cos() + cosine * m.sin())
            )
        else:
            phi, dphi_dc, dphi_dm = cosine - m, torch.ones_like(m), -torch.ones_like(m)
        bias = self.class_bias[index]
        return _Slot(
            index,
            valid,
            factor,
            self.weight[index],
            self.u.gather(1, index[:, None])[:, 0],
            self.scale * phi + bias,
            cosine,
            phi,
            dphi_dc,
            dphi_dm,
        )

    def rest(self) -> Tensor:
        """Maximum (0 if there is none) and sum of exp(u - maximum) over the columns that are no target, [2, N, K]."""
        u = self.u
        for slot in self.slots:
            is_target = F.one_hot(slot.column, self.classes).movedim(-1, 1).bool() & slot.valid[:, None]
            u = u.masked_fill(is_target, -math.inf)
        peak = u.amax(1)
        peak = peak.masked_fill(peak == -math.inf, 0.0)
        return torch.stack([peak, (u - peak[:, None]).exp().sum(1)])

    def others(self, slot: _Slot, rest: Tensor) -> Tensor:
        """L_t - maximum: log-sum-exp over the columns other than the slot's own, from the maximum of the rest."""
        peak, others = rest[0], rest[1].log()
        for other in self.slots:
            if other is not slot:
                separate = other.valid & ((other.column != slot.column) | ~slot.valid)
                others = torch.where(separate, torch.logaddexp(others, other.plain - peak), others)
        return others

    def total(self, slot: _Slot, rest: Tensor) -> Tensor:
        """D_t - maximum; where the row ignores the slot, the log-sum-exp of the plain u - maximum."""
        others = self.others(slot, rest)
        return torch.where(slot.valid, torch.logaddexp(others, slot.shifted - rest[0]), others)

    def soft_weights(self) -> Tensor:
        """w_j times the smoothed probabilities, [N, C, K]."""
        assert self.q is not None
        return self.weight[:, None] * ((1 - self.smoothing) * self.q + self.smoothing / self.classes)


def forward(a: Arguments, with_prediction: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    rows = _Rows(a)
    rest = rows.rest()
    peak, total = rest
    lse = peak + (rows.total(rows.slots[0], rest) if rows.slots else total.log())
    if rows.q is not None:
        log_probabilities = (rows.u - peak[:, None]) - total.log()[:, None]
        loss = -rows.factor * (rows.soft_weights() * log_probabilities).sum(1)
    else:
        loss = torch.zeros_like(lse)
        for slot in rows.slots:
            term = (1 - a.label_smoothing) * slot.weight * _softplus(rows.others(slot, rest) - (slot.shifted - peak))
            if a.label_smoothing > 0:
                is_target = F.one_hot(slot.column, rows.classes).movedim(-1, 1).bool()
                u = torch.where(is_target, slot.shifted[:, None], rows.u) - peak[:, None]
                smooth = (rows.weight[:, None] * (rows.total(slot, rest)[:, None] - u)).sum(1)
                term = term + a.label_smoothing / rows.classes * smooth
            loss = loss + torch.where(slot.valid, slot.factor * term, slot.factor)
    prediction = a.input.argmax(1) if with_prediction else a.input.new_empty((0,), dtype=torch.int64)
    grad_input = a.input.new_empty((0,))
    if with_grad:
        needs = [True, False, False, False, False, False]
        grad_input = backward(loss.new_ones(()), None, rest, a, needs)[0]
    return loss, lse, prediction, rest, grad_input


def backward(grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, a: Arguments, needs: list[bool]) -> list[Tensor]:
    """Gradients of ``DIFFERENTIABLE``, each like its input; [0] where not needed. Upstream: 0-dim or [N, K]."""
    rows = _Rows(a)
    peak = rest[0]
    grad_loss = grad_loss.expand_as(peak)
    zero = torch.zeros_like(peak)
    grad_lse = zero if grad_lse is None else grad_lse.expand_as(peak)
    grads = [rest.new_empty((0,)) for _ in needs]
    exp_u = (rows.u - peak[:, None]).exp()  # the targets' columns may overflow; they are replaced below
    shifted: list[tuple[_Slot, Tensor]] = []  # each slot with d/d(v_t), [N, K]

    if rows.q is not None:
        soft = rows.soft_weights()
        factor = grad_loss * rows.factor
        du = ((factor * soft.sum(1) + grad_lse) / rest[1])[:, None] * exp_u - factor[:, None] * soft
        if needs[1]:
            log_probabilities = (rows.u - peak[:, None]) - rest[1].log()[:, None]
            slope = (1 - a.label_smoothing) * factor[:, None] * rows.weight[:, None]
            grads[1] = torch.empty_like(a.target).copy_(-slope * log_probabilities)
    else:
        total_weight = rows.weight.sum()
        slope, smooth = zero, zero  # sums over the terms of d/d(D_t) exp(maximum - D_t), and of s_t
        terms = []  # (slot, d/d(D_t), D_t - maximum, s_t)
        for position, slot in enumerate(rows.slots):
            others, total = rows.others(slot, rest), rows.total(slot, rest)
            k = torch.where(slot.valid, grad_loss * slot.factor, zero)
            h, s = k * (1 - a.label_smoothing) * slot.weight, k * (a.label_smoothing / rows.classes)
            upstream_lse = grad_lse if position == 0 else zero
            wrong = (others - total).exp()  # 1 - p_y without cancellation
            right = (slot.shifted - peak - total).exp()
            dv = -h * wrong + s * (total_weight * right - slot.weight) + upstream_lse * right
            d_total = h + s * total_weight + upstream_lse
            # without an ordinary column above -inf exp(-total) may overflow; NaN where nothing is finite
            slope = slope + d_total * torch.where(rest[1] == 0, total - total, (-total).exp())
            smooth = smooth + s
            terms.append((slot, d_total, total, s))
            shifted.append((slot, torch.where(slot.valid, dv, zero)))
        du = slope[:, None] * exp_u - smooth[:, None] * rows.weight[:, None]
        for slot, _ in shifted:  # d/d(u_y) through the terms in which y is an ordinary column
            plain = zero
            for other, d_total, total, s in terms:
                if other is not slot:
                    ordinary = ~(other.valid & (other.column == slot.column))
                    value = d_total * (slot.plain - peak - total).exp() - s * slot.weight
                    plain = plain + torch.where(ordinary, value, zero)
            kept = torch.where(slot.valid, plain, du.gather(1, slot.column[:, None])[:, 0])
            du = du.scatter(1, slot.column[:, None], kept[:, None])

    class_scale = rows.class_scale[:, None]
    dc = rows.scale * du  # d/d(class_scale_j * x_j)
    for slot, dv in shifted:
        dc = dc.scatter_add(1, slot.column[:, None], (rows.scale * dv * slot.dphi_dc)[:, None])
    if needs[0]:
        grads[0] = torch.empty_like(a.input).copy_(class_scale * dc)
    if needs[2]:
        grads[2] = du.sum((0, 2))
        for slot, dv in shifted:
            grads[2] = grads[2].index_add(0, slot.column.flatten(), dv.flatten())
    if needs[3]:
        grads[3] = (dc * rows.x).sum((0, 2))
    if needs[4]:
        grads[4] = torch.zeros_like(rows.margin)
        for slot, dv in shifted:
            grads[4] = grads[4].index_add(0, slot.column.flatten(), (rows.scale * dv * slot.dphi_dm).flatten())
    if needs[5]:
        per_scale = (du * (class_scale * rows.x)).sum()
        for slot, dv in shifted:
            per_scale = per_scale + (dv * slot.phi).sum()
        grads[5] = a.scale * per_scale
    return grads
