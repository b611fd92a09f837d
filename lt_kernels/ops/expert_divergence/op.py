"""Schema, shapes, autograd and backends of the divergences between experts.

With u_ej = x_ej / temperature_j, p_e = softmax(u_e), ubar = mean over e of u_e, and, relative to the rows' maxima,
v_ej = u_ej - max_j u_ej, M_e = sum over j of exp(v_ej), vbar and Mbar likewise of ubar, V = sum over e of v_e:

    to_mean    D_e = KL(softmax(ubar) || p_e)         = A_e + log(M_e / Mbar)
    pairwise   D_e = sum over f of KL(p_e || p_f)     = A_e + sum over f of log(M_f / M_e)

    A_e = E_pbar[vbar - v_e] (to_mean), E_{p_e}[E v_e - V] (pairwise)

Relative to the maxima because what is likely is near them, and with logarithms of ratios: A and differences of
log-sum-exps would be large numbers that cancel. A class with probability 0 adds nothing, whatever the others say of it.
With ``row_weight`` [N] the values are multiplied by their row's, and are 0 where that is 0, whatever the logits; with
``reduce`` they are added up.

Forward returns ``value`` [E, N], or 0-dim, and ``saved`` [3 E + 2, N], both in the compute dtype: rows 0..E-1 the
maxima of u_e, the next E the M_e, the next E the A_e; then maximum and sum of ubar (to_mean; else undefined). Backward,
for upstream g_e:

    to_mean    du_e = g_e (p_e - pbar) + (1/E) pbar sum_f g_f (vbar - v_f - A_f)
               the second term only where the mean is not detached
    pairwise   du_e = g_e p_e (E v_e - V - A_e) + p_e sum_f g_f - sum_f g_f p_f
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import compute_dtype
from .._backend import load
from .._experts import empty_gradient, per_argument, shape_of
from .._reduce import ordered_sum
from .._registry import (
    define,
    listed_gradients,
    register_autograd,
    register_no_double_backward,
    through_eager,
    with_transforms,
)

OP = "expert_divergence"
KINDS = ("to_mean", "pairwise")


def _forward(
    logits: list[Tensor],
    temperature: Tensor | None,
    row_weight: Tensor | None,
    kind: str,
    detach: bool,
    reduce: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        value, saved = load(OP, backend).forward(logits, temperature, kind, row_weight)
    else:
        value, saved = load(OP, backend).forward(logits, temperature, kind)
        value = _weighted(value, row_weight)
    return ordered_sum(value) if reduce else value, saved


def _weighted(value: Tensor, row_weight: Tensor | None) -> Tensor:
    return value if row_weight is None else (value * row_weight).masked_fill(row_weight == 0, 0.0)


def _forward_fake(
    logits: list[Tensor],
    temperature: Tensor | None,
    row_weight: Tensor | None,
    kind: str,
    detach: bool,
    reduce: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    e, n, _c = shape_of(logits)
    saved = logits[0].new_empty((3 * e + 2, n), dtype=compute_dtype(logits[0].dtype))
    return saved.new_empty(() if reduce else (e, n)), saved


def _backward(
    grad: Tensor,
    saved: Tensor,
    logits: list[Tensor],
    temperature: Tensor | None,
    row_weight: Tensor | None,
    kind: str,
    detach: bool,
    reduce: bool,
    backend: str,
) -> Tensor:
    e, n, _c = shape_of(logits)
    if backend == "triton":
        result: Tensor = load(OP, backend).backward(
            grad.expand(e, n), saved, logits, temperature, kind, detach, row_weight
        )
        return result
    grad = (grad if row_weight is None else grad * row_weight).expand(e, n)
    result = load(OP, backend).backward(grad, saved, logits, temperature, kind, detach)
    return result


def _backward_fake(grad: Tensor, saved: Tensor, logits: list[Tensor], *_: Any) -> Tensor:
    return empty_gradient(logits)


def eager(
    logits: list[Tensor],
    temperature: Tensor | None,
    row_weight: Tensor | None,
    kind: str,
    detach: bool,
    reduce: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Forward on the reference backend, for autograd, forward mode and ``torch.func`` to go through."""
    value, saved = load(OP, "reference").forward(logits, temperature, kind, detach)
    value = _weighted(value, row_weight)
    return value.sum() if reduce else value, saved


_SCHEMA = "Tensor[] logits, Tensor? temperature, Tensor? row_weight, str kind, bool detach, bool reduce, str backend"
FORWARD = define(f"{OP}_fwd({_SCHEMA}) -> (Tensor value, Tensor saved)", _forward, _forward_fake)
BACKWARD = define(f"{OP}_bwd(Tensor grad, Tensor saved, {_SCHEMA}) -> Tensor", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, temperature, row_weight, *ctx.scalars, ctx.backend = inputs
    _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.logits_are_one = logits[0].dim() == 3
    ctx.logits_need = ctx.needs_input_grad[2 : 2 + len(logits)]
    ctx.save_for_backward(*logits, temperature, row_weight, saved)


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *logits, temperature, row_weight, saved = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    arguments = [temperature, row_weight, *ctx.scalars, ctx.backend]
    if through_eager(ctx.backend, [grad]):
        return listed_gradients(eager, logits, arguments, ctx.needs_input_grad, [grad])
    gradient = torch.ops.lt_kernels.expert_divergence_bwd(grad, saved, logits, *arguments)
    of_logits = per_argument(gradient, ctx.logits_are_one)
    return ([g if need else None for g, need in zip(of_logits, ctx.logits_need, strict=True)], *[None] * 6)


register_autograd(FORWARD, _autograd_backward, _setup_context)
register_no_double_backward(BACKWARD)
forward = with_transforms(torch.ops.lt_kernels.expert_divergence_fwd.default, eager)
