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

Classes that class_bias masks (-inf) leave the sums over j, and C is the number of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._reduce import ordered_sum
from .._rows.row_terms import RowTerms, Slot
from .arguments import Arguments


class _Rows(RowTerms):
    """Everything forward and backward share: shifted logits u [N, C, K] and the targets' terms."""

    def __init__(self, a: Arguments) -> None:
        self.x = a.input.to(a.compute_dtype)
        super().__init__(
            a.options, a.input.shape[1], a.compute_dtype, lambda index: self.x.gather(1, index[:, None])[:, 0]
        )
        self.u = (self.scale * self.class_scale)[:, None] * self.x + self.class_bias[:, None]
        self.q = a.options.target.to(a.compute_dtype) if a.options.target.is_floating_point() else None

    def _is_target(self, slot: Slot) -> Tensor:
        return slot.column[:, None] == torch.arange(self.classes, device=slot.column.device)[:, None]

    def rest(self) -> Tensor:
        """Maximum (0 if there is none) and sum of exp(u - maximum) over the columns that are no target, [2, N, K]."""
        u = self.u
        for slot in self.slots:
            u = u.masked_fill(self._is_target(slot) & slot.valid[:, None], -math.inf)
        peak = u.detach().amax(1)  # any other number would do as well
        peak = peak.masked_fill(peak == -math.inf, 0.0)
        return torch.stack([peak, (u - peak[:, None]).exp().sum(1)])

    def smooth_sum(self, slot: Slot, rest: Tensor) -> Tensor:
        u = torch.where(self._is_target(slot), slot.shifted[:, None], self.u) - rest[0][:, None]
        return self.weigh(self.smooth_weight[:, None], self.total(slot, rest)[:, None] - u).sum(1)

    def soft_weights(self) -> Tensor:
        """w_j times the smoothed probabilities, [N, C, K]."""
        assert self.q is not None
        kept, smooth = (1 - self.smoothing) * self.weight, self.smooth_share * self.smooth_weight
        return kept[:, None] * self.q + smooth[:, None]


def _over_rows(values: Tensor, targets: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sums [C] of values [N, C, K] and of more in the targets' columns: (column, value) [N, K] of each.

    The rows are added pairwise, in an order that depends on the sizes alone. Added to its class one after the other,
    the last of a million rows would count with half of its digits.
    """
    for column, value in targets:
        values = values.scatter_add(1, column[:, None], value[:, None])
    return values.sum(2).sum(0)  # over both at once a short last axis would not be added pairwise


def forward(
    a: Arguments, with_prediction: bool, with_grad: bool, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``. ``out``: where grad_input is written; it may be ``a.input`` itself."""
    rows = _Rows(a)
    rest = rows.rest()
    lse = rows.lse(rest)
    if rows.q is not None:
        log_probabilities = (rows.u - rest[0][:, None]) - rest[1].log()[:, None]
        loss = -rows.factor * rows.weigh(rows.soft_weights(), log_probabilities).sum(1)
    else:
        loss = rows.loss(rest, lambda slot: rows.smooth_sum(slot, rest))
    prediction = a.input.argmax(1) if with_prediction else a.input.new_empty((0,), dtype=torch.int64)
    grad_input = a.input.new_empty((0,))
    if with_grad:
        needs = [True, False, False, False, False, False]
        grad_input = backward(loss.new_ones(()), None, rest, a, needs, out=out)[0]
    return loss, lse, prediction, rest, grad_input


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    rest: Tensor,
    a: Arguments,
    needs: list[bool],
    *,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of ``DIFFERENTIABLE``, each like its input; [0] where not needed. Upstream: 0-dim or [N, K].

    ``out``: as in ``forward``.
    """
    rows = _Rows(a)
    peak = rest[0]
    grad_loss = grad_loss.expand_as(peak)
    zero = torch.zeros_like(peak)
    grad_lse = zero if grad_lse is None else grad_lse.expand_as(peak)
    grads = [rest.new_empty((0,)) for _ in needs]
    exp_u = (rows.u - peak[:, None]).exp()  # the targets' columns may overflow; they are replaced below
    shifted: list[tuple[Slot, Tensor]] = []  # each slot with d/d(v_t), [N, K]

    if rows.q is not None:
        soft = rows.soft_weights()
        factor = grad_loss * rows.factor
        du = ((factor * soft.sum(1) + grad_lse) / rest[1])[:, None] * exp_u - factor[:, None] * soft
        if needs[1]:
            log_probabilities = (rows.u - peak[:, None]) - rest[1].log()[:, None]
            slope = (1 - a.options.label_smoothing) * factor[:, None] * rows.weight[:, None]
            grads[1] = torch.empty_like(a.options.target).copy_(-slope * log_probabilities)
    else:
        slope, smooth, targets = rows.slopes(rest, grad_loss, grad_lse)
        du = slope[:, None] * exp_u - smooth[:, None] * rows.smooth_weight[:, None]
        for slot, plain, dv in targets:
            kept = torch.where(slot.valid, plain, du.gather(1, slot.column[:, None])[:, 0])
            du = du.scatter(1, slot.column[:, None], kept[:, None])
            shifted.append((slot, dv))

    class_scale = rows.class_scale[:, None]
    dc = rows.scale * du  # d/d(class_scale_j * x_j)
    for slot, dv in shifted:
        dc = dc.scatter_add(1, slot.column[:, None], (rows.scale * dv * slot.dphi_dc)[:, None])
    if needs[2]:
        grads[2] = _over_rows(du, [(slot.column, dv) for slot, dv in shifted])
    if needs[3]:
        grads[3] = _over_rows(dc * rows.x, [])
    if needs[4]:
        grads[4] = _over_rows(
            torch.zeros_like(du), [(slot.column, rows.scale * dv * slot.dphi_dm) for slot, dv in shifted]
        )
    if needs[5]:
        per_scale = ordered_sum(du * (class_scale * rows.x))
        for slot, dv in shifted:
            per_scale = per_scale + ordered_sum(dv * slot.phi)
        grads[5] = a.options.scale * per_scale
    if needs[0]:  # last: `out` may be what was read above
        grads[0] = (torch.empty_like(a.input) if out is None else out).copy_(class_scale * dc)
    return grads
