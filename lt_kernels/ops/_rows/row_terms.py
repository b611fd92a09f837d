"""Scalars of rows in eager PyTorch: what loss and gradient are made of once the columns have been summed.

Everything that a row needs beside its ordinary columns' sums (``rest``) are its targets' own logits. The formulas are
those of ``reference.py``, which applies them to logits in memory; linear heads apply them where no row is in memory as
a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import check_classes, reads_values
from ..._smooth import logaddexp, softplus
from .options import RowOptions, Slot

_SIN2_MIN = 1e-7  # keeps the angular derivative cot(theta) finite at theta = 0


def _sine(sin2: Tensor) -> Tensor:
    """sqrt(sin2), 0 if that is negative; for autograd with the slope of sqrt(max(sin2, _SIN2_MIN))."""
    above = sin2.clamp_min(_SIN2_MIN).sqrt()
    line = sin2.detach().clamp_min(0).sqrt() + (sin2 - sin2.detach()) * (0.5 / math.sqrt(_SIN2_MIN))
    return torch.where(sin2 >= _SIN2_MIN, above, line)


def log_mass(mass: Tensor) -> Tensor:
    """log(mass), -inf where it is 0, there without a slope."""
    return mass.masked_fill(mass == 0, 1.0).log().masked_fill(mass == 0, -math.inf)


def _show_overflow(logit: Tensor) -> Tensor:
    """Return a target's logit, NaN where it is infinite: so is its row, as in torch.

    That of an ordinary column makes it so by its difference from the peak; a target's is in no peak, and its loss would
    be 0.
    """
    return torch.where(logit == math.inf, math.nan, logit)


class Slopes(NamedTuple):
    """Gradients of rows, each [N, K]: d/d(u_j) = slope exp(u_j - peak) - smooth smooth_weight_j of ordinary columns."""

    slope: Tensor
    smooth: Tensor
    targets: list[tuple[Slot, Tensor, Tensor]]  # d/d(u_y) through terms in which y is an ordinary column, and d/d(v_t)


class RowTerms:
    """Class vectors with their defaults filled in, and the targets of rows.

    Args:
        o: the options of the loss.
        classes: C.
        dtype: the compute dtype.
        raw: given a class per row [N, K], the rows' raw logits x of these classes, [N, K] in the compute dtype.
    """

    def __init__(self, o: RowOptions, classes: int, dtype: torch.dtype, raw: Callable[[Tensor], Tensor]) -> None:
        ones = torch.ones(classes, dtype=dtype, device=o.target.device)
        self.classes, self.angular, self.smoothing = classes, o.angular, o.label_smoothing
        self.scale = ones.new_full((), o.scale) if o.learned_scale is None else o.scale * o.learned_scale
        self.class_scale = ones if o.class_scale is None else o.class_scale
        self.class_bias = torch.zeros_like(ones) if o.class_bias is None else o.class_bias
        self.margin = torch.full_like(ones, o.margin) if o.class_margin is None else o.class_margin + o.margin
        self.weight = ones if o.weight is None else o.weight
        # smoothing is the sum of smooth_share smooth_weight_j (D - u_j)
        self.masks = o.masks
        self.smooth_weight = self.weight if o.smooth_weight is None else o.smooth_weight
        self.smooth_share = o.label_smoothing / classes if o.smooth_weight is None else 1.0

        factor = ones.new_ones(2) if o.coefficient is None else o.coefficient
        self.factor = factor[0]
        self.slots: list[Slot] = []
        if o.target.is_floating_point():
            return
        if o.mixed_target is None:
            self.slots = [self._slot("target", o.target, factor[0].expand(o.target.shape), o.ignore_index, raw)]
        else:
            assert o.mix_lambda is not None
            share = o.mix_lambda.to(dtype).expand(o.target.shape)
            self.slots = [
                self._slot("target", o.target, factor[0] * share, o.ignore_index, raw),
                self._slot("mixed_target", o.mixed_target, factor[1] * (1 - share), o.ignore_index, raw),
            ]

    def _slot(
        self, name: str, target: Tensor, factor: Tensor, ignore_index: int, raw: Callable[[Tensor], Tensor]
    ) -> Slot:
        valid = target != ignore_index
        bad = valid & ((target < 0) | (target >= self.classes))
        if reads_values(target):
            check_classes(name, target, self.classes, ignore_index)
        factor = torch.where(valid, factor, 0 * factor).masked_fill(bad, math.nan)
        index = target.masked_fill(~valid | bad, 0)
        x = raw(index)
        cosine = self.class_scale[index] * x
        m = self.margin[index]
        if self.angular:
            sin2 = 1 - cosine.square()
            rotated = cosine * m.cos() - _sine(sin2) * m.sin()
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
        return Slot(
            index,
            valid,
            factor,
            self.weight[index],
            self.smooth_weight[index],
            _show_overflow((self.scale * self.class_scale[index]) * x + bias),
            _show_overflow(self.scale * phi + bias),
            cosine,
            phi,
            dphi_dc,
            dphi_dm,
        )

    def weigh(self, weight: Tensor, values: Tensor) -> Tensor:
        """Return weight times values, 0 where a class has no weight: a masked one's logit is -inf."""
        return weight * (torch.where(weight == 0, 0.0, values) if self.masks else values)

    def others(self, slot: Slot, rest: Tensor) -> Tensor:
        """L_t - maximum: log-sum-exp over the columns other than the slot's own, from the maximum of the rest."""
        peak, others = rest[0], log_mass(rest[1])
        for other in self.slots:
            if other is not slot:
                separate = other.valid & ((other.column != slot.column) | ~slot.valid)
                others = torch.where(separate, logaddexp(others, other.plain - peak), others)
        return others

    def total(self, slot: Slot, rest: Tensor) -> Tensor:
        """D_t - maximum; where the row ignores the slot, the log-sum-exp of the plain u - maximum."""
        others = self.others(slot, rest)
        return torch.where(slot.valid, logaddexp(others, slot.shifted - rest[0]), others)

    def lse(self, rest: Tensor) -> Tensor:
        """log-sum-exp of the shifted logits that the (first) target's loss uses, [N, K]."""
        return rest[0] + (self.total(self.slots[0], rest) if self.slots else log_mass(rest[1]))

    def loss(self, rest: Tensor, smooth_sum: Callable[[Slot], Tensor]) -> Tensor:
        """Of class-index targets, [N, K]. smooth_sum: sum_j smooth_weight_j (D_t - u_j) with v_t in place of u_y; asked
        for only where there is smoothing."""
        loss = torch.zeros_like(rest[0])
        for slot in self.slots:
            term = (1 - self.smoothing) * slot.weight * softplus(self.others(slot, rest) - (slot.shifted - rest[0]))
            if self.smoothing > 0:
                term = term + self.smooth_share * smooth_sum(slot)
            # an ignored row's factor may be NaN, and is to have no slope
            loss = loss + torch.where(slot.valid, slot.factor.masked_fill(~slot.valid, 0.0) * term, slot.factor)
        return loss

    def slopes(self, rest: Tensor, grad_loss: Tensor, grad_lse: Tensor) -> Slopes:
        """Of class-index targets, for upstream gradients [N, K]."""
        peak, zero = rest[0], torch.zeros_like(rest[0])
        total_weight = self.smooth_weight.sum()
        slope, smooth = zero, zero  # sums over the terms of d/d(D_t) exp(maximum - D_t), and of s_t
        terms = []  # (slot, d/d(D_t), D_t - maximum, s_t, d/d(v_t))
        for position, slot in enumerate(self.slots):
            others, total = self.others(slot, rest), self.total(slot, rest)
            k = torch.where(slot.valid, grad_loss * slot.factor, zero)
            h, s = k * (1 - self.smoothing) * slot.weight, k * self.smooth_share
            upstream_lse = grad_lse if position == 0 else zero
            wrong = (others - total).exp()  # 1 - p_y without cancellation
            right = (slot.shifted - peak - total).exp()
            dv = -h * wrong + s * (total_weight * right - slot.smooth_weight) + upstream_lse * right
            d_total = h + s * total_weight + upstream_lse
            # without an ordinary column above -inf exp(-total) may overflow; NaN where nothing is finite
            slope = slope + d_total * torch.where(rest[1] == 0, total - total, (-total).exp())
            smooth = smooth + s
            terms.append((slot, d_total, total, s, torch.where(slot.valid, dv, zero)))
        targets = []
        for slot, _, _, _, dv in terms:
            plain = zero
            for other, d_total, total, s, _ in terms:
                if other is not slot:
                    ordinary = ~(other.valid & (other.column == slot.column))
                    value = d_total * (slot.plain - peak - total).exp() - s * slot.smooth_weight
                    plain = plain + torch.where(ordinary, value, zero)
            targets.append((slot, plain, dv))
        return Slopes(slope, smooth, targets)
