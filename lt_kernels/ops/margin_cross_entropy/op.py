"""Schema, shapes, autograd and backends of the rows kernel.

Layout (the caller flattens to it): input [N, C, K], where K counts the positions that share one sample (pixels; 1 for a
classifier). A *row* is one (n, k) pair with its C logits. The mathematics is in ``reference.py``.

Forward returns, per row [N, K] in the compute dtype unless said otherwise:
    loss        sum over the target terms; 0-dim, summed over rows, where ``reduce``
    lse         log-sum-exp of the shifted logits that the (first) target's loss uses
    prediction  int64 argmax of the raw logits; [0] unless ``with_prediction``
    rest        [2, N, K]: what backward needs beside the input. Over the columns that are no target of the row: their
                maximum (0 where all are -inf) and the sum of exp(u - maximum). Kept apart because their log-sum-exp in
                one float32 loses up to half an ulp of the maximum, which at scale 64 is 30 roundings of a probability.
    grad_input  d(sum of loss)/d(input) in the input's dtype; [0] unless ``with_grad``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import load
from .._reduce import ordered_sum
from .._registry import (
    ReadyGradient,
    define,
    eager_gradients,
    register_autograd,
    register_no_double_backward,
    through_eager,
    with_transforms,
)
from .._rows.options import RowOptions
from .arguments import DIFFERENTIABLE, SIGNATURE, Arguments

OP = "margin_cross_entropy"


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *inputs, reduce, with_prediction, with_grad, backend = args
    loss, lse, prediction, rest, grad_input = load(OP, backend).forward(
        SIGNATURE.read(inputs), with_prediction, with_grad
    )
    return (sum_rows(loss, backend) if reduce else loss), lse, prediction, rest, grad_input


def sum_rows(loss: Tensor, backend: str) -> Tensor:
    """Sum of all elements, 0-dim, always added in the same order; on the CPU the order of the backend's own."""
    if backend == "native" and loss.device.type == "cpu":
        total: Tensor = load(OP, backend).ordered_sum(loss)
        return total
    return ordered_sum(loss)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *inputs, reduce, with_prediction, with_grad, _ = args
    a = SIGNATURE.rebuild(inputs)
    n, _, k = a.input.shape
    rows = a.input.new_empty((n, k), dtype=a.compute_dtype)
    return (
        rows.new_empty(()) if reduce else rows,
        torch.empty_like(rows),
        rows.new_empty((n, k) if with_prediction else (0,), dtype=torch.int64),
        rows.new_empty((2, n, k)),
        torch.empty_like(a.input) if with_grad else a.input.new_empty((0,)),
    )


def _backward(grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs, backend = args
    return load(OP, backend).backward(grad_loss, grad_lse, rest, SIGNATURE.read(inputs), needs)


def _backward_fake(grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs, _ = args
    named = dict(zip(SIGNATURE.names, inputs, strict=True))
    return [
        torch.empty_like(named[name]) if need else rest.new_empty((0,))
        for name, need in zip(DIFFERENTIABLE, needs, strict=True)
    ]


def eager(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward on the reference backend, for autograd, forward mode and ``torch.func`` to go through."""
    *inputs, reduce, with_prediction, _, _ = args
    return eager_rows(SIGNATURE.read(inputs), reduce, with_prediction)


def eager_rows(
    a: Arguments, reduce: bool = False, with_prediction: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what ``eager`` does, for the operators that are made of rows."""
    loss, *others = load(OP, "reference").forward(a, with_prediction, False)
    return (ordered_sum(loss) if reduce else loss, *others)


def scale_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """gradient *= factor without a host synchronisation, and without touching memory where factor is 1."""
    if backend != "reference":
        load(OP, backend).scale_gradient_(gradient, factor)
    elif gradient.device.type != "cpu" or factor.item() != 1.0:
        gradient.mul_(factor)


FORWARD = define(
    f"{OP}_fwd({SIGNATURE.schema}, bool reduce, bool with_prediction, bool with_grad, str backend)"
    " -> (Tensor loss, Tensor lse, Tensor prediction, Tensor rest, Tensor grad_input)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    f"{OP}_bwd(Tensor grad_loss, Tensor? grad_lse, Tensor rest, {SIGNATURE.schema}, bool[] needs, str backend)"
    " -> Tensor[]",
    _backward,
    _backward_fake,
)


def _mean_coefficient(*args: Any) -> Tensor:
    *inputs, backend = args
    return load(OP, backend).mean_coefficient(*inputs)


def _mean_coefficient_fake(target: Tensor, mixed_target: Tensor | None, *args: Any) -> Tensor:
    return target.new_empty((1 if mixed_target is None else 2,), dtype=args[3])


define(
    f"{OP}_mean_coefficient(Tensor target, Tensor? mixed_target, Tensor? weight, int ignore_index, int classes,"
    " ScalarType dtype, float factor, str backend) -> Tensor",
    _mean_coefficient,
    _mean_coefficient_fake,
)


def mean_coefficient(
    target: Tensor,
    mixed_target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    classes: int,
    dtype: torch.dtype,
    backend: str,
    factor: float = 1.0,
) -> Tensor:
    """factor / total class weight of the targets that are not ignored, [1], or [2] with ``mixed_target``; inf for 0."""
    has_own = backend == "triton" or (backend == "native" and target.device.type == "cpu")
    if has_own and not torch.compiler.is_compiling():  # one launch or call; compiled code fuses what follows
        return torch.ops.lt_kernels.margin_cross_entropy_mean_coefficient(
            target, mixed_target, weight, ignore_index, classes, dtype, factor, backend
        )
    totals = []
    for each in (target,) if mixed_target is None else (target, mixed_target):
        valid = (each != ignore_index).reshape(-1)
        if weight is None:
            totals.append(valid.sum(0, keepdim=True).to(dtype))
        else:
            totals.append(ordered_sum(weight[each.reshape(-1).clamp(0, classes - 1)] * valid).reshape(1))
    coefficient = (totals[0] if mixed_target is None else torch.cat(totals)).reciprocal()
    return coefficient if factor == 1.0 else coefficient * factor


#: Most rows whose targets every program of the rows' weights counts: more are counted once.
_COUNTED = 8192


def _row_weights(*args: Any) -> Tensor:
    *inputs, backend = args
    return load(OP, backend).row_weights(*inputs)


def _row_weights_fake(target: Tensor, *args: Any) -> Tensor:
    return target.new_empty((target.numel(),), dtype=torch.float32)


define(
    f"{OP}_row_weights(Tensor target, Tensor? mixed_target, Tensor? mix_lambda, int ignore_index, bool mean,"
    " float factor, str backend) -> Tensor",
    _row_weights,
    _row_weights_fake,
)


def row_weights(o: RowOptions, reduction: str, factor: float, dtype: torch.dtype, backend: str) -> Tensor:
    """Return what terms of rows are multiplied by, [N] for positions in order: ``factor`` and, for a mean, 1 / the
    number of targets that are not ignored; 0 where they are. Of two targets each counts by its share, with its own
    mean."""
    mean = reduction == "mean"
    targets = [o.target] if o.mixed_target is None else [o.target, o.mixed_target]
    share = o.mix_lambda
    fits = o.target.numel() <= _COUNTED
    if backend == "triton" and fits and dtype == torch.float32 and not torch.compiler.is_compiling():
        shares = share if share is None or share.dim() == 0 else share.reshape(-1)
        return torch.ops.lt_kernels.margin_cross_entropy_row_weights(
            o.target, o.mixed_target, shares, o.ignore_index, mean, factor, backend
        )
    weights = []
    for target in targets:
        kept = (target != o.ignore_index).reshape(-1)
        weight = kept.to(dtype)
        if mean:
            weight = weight / kept.sum().clamp_min(1)
        weights.append(weight if factor == 1.0 else weight * factor)
    if len(weights) == 1 or share is None:
        return weights[0]
    share = share.reshape(-1) if share.dim() > 0 else share
    return share * weights[0] + (1 - share) * weights[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, _, _, with_grad, backend = inputs
    _, _, prediction, rest, grad_input = output
    ctx.mark_non_differentiable(prediction, rest, grad_input)
    ctx.set_materialize_grads(False)
    tensors, ctx.others = SIGNATURE.split(arguments)
    ctx.backend = backend
    ctx.needs = SIGNATURE.needs(ctx.needs_input_grad[1:])
    ctx.gradient = ReadyGradient(with_grad and ctx.needs == [True] + [False] * (len(DIFFERENTIABLE) - 1))
    ctx.save_for_backward(*tensors, rest, grad_input if ctx.gradient.ready else None)


def _autograd_backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    *tensors, rest, grad_input = ctx.saved_tensors
    gradients: dict[str, Tensor] = {}
    factor = grad_loss if grad_lse is None and grad_loss is not None and grad_loss.dim() == 0 else None
    for ready in ctx.gradient.take([grad_input], factor):
        assert factor is not None
        scale_(ready, factor, ctx.backend)
        gradients["input"] = ready
    if not gradients and not (grad_loss is None and grad_lse is None):
        arguments = SIGNATURE.join(tensors, ctx.others)
        if through_eager(ctx.backend, (grad_loss, grad_lse)):
            settings = (grad_loss is not None and grad_loss.dim() == 0, False, False, ctx.backend)
            upstream = [grad_loss, grad_lse]
            return tuple(eager_gradients(eager, [*arguments, *settings], ctx.needs_input_grad[1:], upstream))
        if grad_loss is None:
            grad_loss = rest.new_zeros(())
        values = torch.ops.lt_kernels.margin_cross_entropy_bwd(
            grad_loss, grad_lse, rest, *arguments, ctx.needs, ctx.backend
        )
        gradients = {name: value for name, value, need in zip(DIFFERENTIABLE, values, ctx.needs, strict=True) if need}
    return (*SIGNATURE.gradients(gradients), None, None, None, None)


register_autograd(FORWARD, _autograd_backward, _setup_context)
register_no_double_backward(BACKWARD)
forward = with_transforms(torch.ops.lt_kernels.margin_cross_entropy_fwd.default, eager)
