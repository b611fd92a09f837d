"""Schema, shapes, autograd and backends of the experts' cross-entropy.

Expert e is one call of the rows kernel (``margin_cross_entropy``) on its logits [N, C] with the class bias
``taus[e] * log_prior + class_bias``; targets and all other options are shared. The ensemble, where it is asked for, is
the plain cross-entropy of zbar = scale * mean over experts of their logits: no prior, margin, class vector, smoothing.

Forward returns, in the compute dtype unless said otherwise:
    loss                 [E, N] per expert and row; [E] with ``reduce="rows"``; 0-dim with ``reduce="all"``
    rest                 [E, 2, N]: what backward needs beside the inputs, per expert as of the rows kernel
    ensemble_loss        [N] (summed over the targets' terms), 0-dim unless ``reduce="none"``; [0] if not asked for
    ensemble_prediction  [N] int64 argmax of zbar; [0] if not asked for
    grad_logits          [E, N, C] d(sum of loss)/d(logits) in the logits' dtype; [0] unless ``with_grad``

The backward operator is the rows kernel's, expert by expert, on every backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import load
from .._experts import empty_gradient, per_argument, shape_of
from .._reduce import ordered_sum
from .._registry import (
    ReadyGradient,
    define,
    listed_gradients,
    register_autograd,
    register_no_double_backward,
    through_eager,
    with_transforms,
)
from ..margin_cross_entropy.op import OP as ROWS
from ..margin_cross_entropy.op import eager_rows, scale_, sum_rows
from .arguments import DIFFERENTIABLE, SIGNATURE
from .looped import ensemble_of

OP = "expert_cross_entropy"

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(*args: Any) -> Result:
    *inputs, reduce, with_ensemble, with_grad, backend = args
    loss, rest, ensemble_loss, prediction, grad = load(OP, backend).forward(
        SIGNATURE.read(inputs), with_ensemble, with_grad
    )
    if reduce != "none":
        loss = sum_rows(loss, backend) if reduce == "all" else torch.stack([sum_rows(each, backend) for each in loss])
        ensemble_loss = sum_rows(ensemble_loss, backend) if with_ensemble else ensemble_loss
    return loss, rest, ensemble_loss, prediction, grad


def _forward_fake(*args: Any) -> Result:
    *inputs, reduce, with_ensemble, with_grad, _ = args
    a = SIGNATURE.rebuild(inputs)
    e, n, _ = shape_of(a.logits)
    rows = a.logits[0].new_empty((n,), dtype=a.compute_dtype)
    ensemble = (n,) if with_ensemble else (0,)
    return (
        rows.new_empty({"none": (e, n), "rows": (e,), "all": ()}[reduce]),
        rows.new_empty((e, 2, n)),
        rows.new_empty(() if with_ensemble and reduce != "none" else ensemble),
        rows.new_empty(ensemble, dtype=torch.int64),
        empty_gradient(a.logits) if with_grad else a.logits[0].new_empty((0,)),
    )


def _backward(grad_loss: Tensor, rest: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs, backend = args
    a = SIGNATURE.read(inputs)
    rows_needs = [needs[0], False, *needs[1:]]  # the rows kernel's second is the gradient of probabilities
    buffer = empty_gradient(a.logits) if needs[0] else rest.new_empty((0,))
    vectors: list[list[Tensor]] = [[] for _ in needs]
    for e, row in enumerate(a.rows()):
        upstream = grad_loss if grad_loss.dim() == 0 else grad_loss[e]
        upstream = upstream[:, None] if upstream.dim() == 1 else upstream
        out = buffer[e].unsqueeze(2) if needs[0] else None
        grads = load(ROWS, backend).backward(upstream, None, rest[e][:, :, None], row, rows_needs, out=out)
        for i in range(1, len(needs)):
            vectors[i].append(grads[i + 1])
    results = [buffer]
    for i in range(1, len(needs)):
        if not needs[i]:
            results.append(rest.new_empty((0,)))
        else:
            stacked = torch.stack(vectors[i])
            per_expert = i == 1 and a.options.class_bias is not None and a.options.class_bias.dim() == 2
            results.append(stacked if per_expert else stacked.sum(0))
    return results


def _backward_fake(grad_loss: Tensor, rest: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs, _ = args
    a = SIGNATURE.rebuild(inputs)
    results = [empty_gradient(a.logits) if needs[0] else rest.new_empty((0,))]
    for name, need in zip(DIFFERENTIABLE[1:], needs[1:], strict=True):
        results.append(torch.empty_like(getattr(a.options, name)) if need else rest.new_empty((0,)))
    return results


def eager(*args: Any) -> Result:
    """Forward on the reference backend, for autograd, forward mode and ``torch.func`` to go through."""
    *inputs, reduce, with_ensemble, _, _ = args
    a = SIGNATURE.read(inputs)
    results = [eager_rows(row) for row in a.rows()]
    loss = torch.stack([of_expert[0][:, 0] for of_expert in results])
    rest = torch.stack([of_expert[3][:, :, 0] for of_expert in results])
    ensemble_loss = prediction = loss.new_empty((0,))
    if with_ensemble:
        ensemble_loss, prediction = (value.detach() for value in ensemble_of(a, "reference"))
    if reduce != "none":
        loss = ordered_sum(loss) if reduce == "all" else torch.stack([ordered_sum(each) for each in loss])
        ensemble_loss = ordered_sum(ensemble_loss) if with_ensemble else ensemble_loss
    return loss, rest, ensemble_loss, prediction, loss.new_empty((0,))


FORWARD = define(
    f"{OP}_fwd({SIGNATURE.schema}, str reduce, bool with_ensemble, bool with_grad, str backend)"
    " -> (Tensor loss, Tensor rest, Tensor ensemble_loss, Tensor ensemble_prediction, Tensor grad_logits)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    f"{OP}_bwd(Tensor grad_loss, Tensor rest, {SIGNATURE.schema}, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *others, _, _, with_grad, backend = inputs
    _, rest, ensemble_loss, prediction, grad = output
    ctx.mark_non_differentiable(rest, ensemble_loss, prediction, grad)
    ctx.set_materialize_grads(False)
    tensors, ctx.others = SIGNATURE.split((None, *others))  # a Tensor[] is not among the tensors
    ctx.backend, ctx.logits_are_one = backend, logits[0].dim() == 3
    ctx.logits_need = ctx.needs_input_grad[2 : 2 + len(logits)]
    ctx.needs = SIGNATURE.needs((any(ctx.logits_need), *ctx.needs_input_grad[2 + len(logits) :]))
    ctx.gradient = ReadyGradient(with_grad and ctx.needs == [True] + [False] * (len(DIFFERENTIABLE) - 1))
    ctx.save_for_backward(*logits, *tensors, rest, grad if ctx.gradient.ready else None)


def _scale(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """gradient [E, N, C] times an upstream gradient, 0-dim or [E]."""
    if factor.dim() == 0:
        scale_(gradient, factor, backend)
    elif all(each.is_contiguous() for each in gradient):
        for each, its in zip(gradient, factor, strict=True):
            scale_(each, its, backend)
    else:
        gradient.mul_(factor[:, None, None])


def _autograd_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *tensors, rest, grad = ctx.saved_tensors
    logits, tensors = list(tensors[: ctx.list_length]), tensors[ctx.list_length :]
    gradients: dict[str, Any] = {}
    for ready in ctx.gradient.take([grad], grad_loss if grad_loss is not None and grad_loss.dim() < 2 else None):
        assert grad_loss is not None
        _scale(ready, grad_loss, ctx.backend)
        gradients["logits"] = ready
    if grad_loss is not None and through_eager(ctx.backend, (grad_loss,)):
        reduce = ("all", "rows", "none")[grad_loss.dim()]
        arguments = [*SIGNATURE.join(tensors, ctx.others)[1:], reduce, False, False, ctx.backend]
        return listed_gradients(eager, logits, arguments, ctx.needs_input_grad, [grad_loss])
    if not gradients and grad_loss is not None:
        values = torch.ops.lt_kernels.expert_cross_entropy_bwd(
            grad_loss, rest, logits, *SIGNATURE.join(tensors, ctx.others)[1:], ctx.needs, ctx.backend
        )
        gradients = {name: value for name, value, need in zip(DIFFERENTIABLE, values, ctx.needs, strict=True) if need}
    if "logits" in gradients:
        of_logits = per_argument(gradients["logits"], ctx.logits_are_one)
        gradients["logits"] = [g if need else None for g, need in zip(of_logits, ctx.logits_need, strict=True)]
    return (*SIGNATURE.gradients(gradients), None, None, None, None)


register_autograd(FORWARD, _autograd_backward, _setup_context)
register_no_double_backward(BACKWARD)
forward = with_transforms(torch.ops.lt_kernels.expert_cross_entropy_fwd.default, eager)
