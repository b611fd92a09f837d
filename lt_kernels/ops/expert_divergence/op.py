"""Schema, shapes, autograd and backends of the divergences between experts.

With u_ej = x_ej / temperature_j, p_e = softmax(u_e), ubar = mean over e of u_e, and, relative to the rows' maxima,
v_ej = u_ej - max_j u_ej, M_e = sum over j of exp(v_ej), vbar and Mbar likewise of ubar, V = sum over e of v_e:

    to_mean    D_e = KL(softmax(ubar) || p_e)         = A_e + log(M_e / Mbar)
    pairwise   D_e = sum over f of KL(p_e || p_f)     = A_e + sum over f of log(M_f / M_e)

    A_e = E_pbar[vbar - v_e] (to_mean), E_{p_e}[E v_e - V] (pairwise)

Relative to the maxima because what is likely is near them, and with logarithms of ratios: A and differences of
log-sum-exps would be large numbers that cancel. A class with probability 0 adds nothing, whatever the others say of it.
Forward returns ``value`` [E, N] and ``saved`` [3 E + 2, N], both in the compute dtype: rows 0..E-1 the maxima of u_e,
the next E the M_e, the next E the A_e; then maximum and sum of ubar (to_mean; else undefined). Backward, for upstream
g_e:

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


def _forward(logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool, backend: str) -> Any:
    return load(OP, backend).forward(logits, temperature, kind)


def _forward_fake(logits: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    e, n, _c = shape_of(logits)
    value = logits[0].new_empty((e, n), dtype=compute_dtype(logits[0].dtype))
    return value, value.new_empty((3 * e + 2, n))


def _backward(
    grad: Tensor, saved: Tensor, logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool, backend: str
) -> Tensor:
    result: Tensor = load(OP, backend).backward(grad, saved, logits, temperature, kind, detach)
    return result


def _backward_fake(grad: Tensor, saved: Tensor, logits: list[Tensor], *_: Any) -> Tensor:
    return empty_gradient(logits)


def eager(logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool, backend: str) -> Any:
    """Forward on the reference backend, for autograd, forward mode and ``torch.func`` to go through."""
    return load(OP, "reference").forward(logits, temperature, kind, detach)


_SCHEMA = "Tensor[] logits, Tensor? temperature, str kind, bool detach, str backend"
FORWARD = define(f"{OP}_fwd({_SCHEMA}) -> (Tensor value, Tensor saved)", _forward, _forward_fake)
BACKWARD = define(f"{OP}_bwd(Tensor grad, Tensor saved, {_SCHEMA}) -> Tensor", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, temperature, *ctx.scalars, ctx.backend = inputs
    _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.logits_are_one = logits[0].dim() == 3
    ctx.logits_need = ctx.needs_input_grad[2 : 2 + len(logits)]
    ctx.save_for_backward(*logits, temperature, saved)


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *logits, temperature, saved = ctx.saved_tensors
    if grad is None:
        return (None,) * 5
    if through_eager(ctx.backend, [grad]):
        arguments = [temperature, *ctx.scalars, ctx.backend]
        return listed_gradients(eager, logits, arguments, ctx.needs_input_grad, [grad])
    gradient = torch.ops.lt_kernels.expert_divergence_bwd(grad, saved, logits, temperature, *ctx.scalars, ctx.backend)
    of_logits = per_argument(gradient, ctx.logits_are_one)
    return ([g if need else None for g, need in zip(of_logits, ctx.logits_need, strict=True)], None, None, None, None)


register_autograd(FORWARD, _autograd_backward, _setup_context)
register_no_double_backward(BACKWARD)
forward = with_transforms(torch.ops.lt_kernels.expert_divergence_fwd.default, eager)
