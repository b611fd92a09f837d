"""Schema, shapes, autograd and strategies of linear heads: logits x = input linear_weight^T are never asked for.

Layout (the caller flattens to it): input [N, D], linear_weight [C * K, D], results of rows [N, K] as in the rows
kernel's ``op.py``. Strategies are those of ``plan.py``; ``backend`` names the rows kernel that runs on the buffers
(and must be "triton" for "tiled"). Forward returns

    loss, lse, prediction, rest     as the rows kernel does
    logits                          [N, C * K] where "materialize": the logits, or their gradient where ``with_grad``
    grad_input, grad_weight, grad_bias   where "chunked" and ``with_grad``, those of ``needs``

each [0] otherwise. Backward computes from ``rest``, and from ``logits`` if they were kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import check_classes
from .._backend import load
from .._gemm import products
from .._reduce import ordered_sum
from .._registry import (
    ReadyGradient,
    define,
    eager_gradients,
    register_autograd,
    register_no_double_backward,
    spends_in_place,
    through_eager,
    with_transforms,
)
from ..margin_cross_entropy.arguments import Arguments as RowArguments
from ..margin_cross_entropy.op import OP as ROWS
from ..margin_cross_entropy.op import eager_rows, scale_
from . import chunked
from .arguments import DIFFERENTIABLE, SIGNATURE, Arguments
from .plan import Sizes, chunk_plan

OP = "linear_margin_cross_entropy"
_OWN = ("input", "linear_weight", "linear_bias")  # what forward can have gradients of


def sizes(a: Arguments, training: bool, one_pass: bool, learns: bool) -> Sizes:
    """learns: whether class vectors do."""
    soft = a.options.target.is_floating_point()
    return Sizes(
        a.input.shape[0], a.input.shape[1], a.classes, a.positions, a.input.dtype, a.linear_weight.dtype,
        a.input.device.type, training, one_pass, a.positions == 1 and not soft and not learns,
    )  # fmt: skip


def _tiled_module() -> Any:
    return load(OP, "triton")


def _check_targets(a: Arguments) -> None:
    """On the CPU, before anything else: the chunks' kernels would name rows of a chunk."""
    if a.input.device.type != "cpu":
        return
    for name in ("target", "mixed_target"):
        target: Tensor | None = getattr(a.options, name)
        if target is not None and not target.is_floating_point():
            check_classes(name, target, a.classes, a.options.ignore_index)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, strategy, memory_budget, reduce, with_prediction, with_grad, needs, backend = args
    a = SIGNATURE.read(inputs)
    logits, *grads = (a.input.new_empty((0,)) for _ in range(1 + len(_OWN)))  # an operator's outputs are distinct
    with torch.autocast(a.input.device.type, enabled=False):  # dtypes have been chosen
        _check_targets(a)
        if strategy == "tiled":
            results = chunked.Forward(*_tiled_module().forward(a, a.inverse_norms(), with_prediction))
        else:
            head = chunked.Head(a, load(ROWS, backend), with_prediction)
            all_needs = [*needs, *[False] * (len(DIFFERENTIABLE) - len(_OWN))]
            if strategy == "materialize":
                logits = head.buffer(head.n, head.columns)
                head.logits(logits, slice(None), slice(None))
                results = chunked.forward_logits(head, logits, slice(None), with_prediction, with_grad)
                if with_grad:
                    head.of_products(logits, slice(None))
            else:
                plan = chunk_plan(sizes(a, with_grad, with_grad, False), memory_budget)
                if plan.by == "rows":
                    gradients = chunked.Gradients(head, all_needs) if with_grad else None
                    results, values = chunked.forward_rows(head, plan.chunk, with_prediction, gradients)
                else:
                    results = chunked.forward_classes(head, plan.chunk, with_prediction)
                    values = []
                    if with_grad:
                        one = results.loss.new_ones(())
                        values = chunked.backward_classes(head, plan.chunk, one, None, results.rest, all_needs)
                grads = values[: len(_OWN)] or grads
    loss = ordered_sum(results.loss) if reduce else results.loss
    return (loss, *results[1:], logits, *grads)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, strategy, _, reduce, with_prediction, with_grad, needs, _ = args
    a = SIGNATURE.rebuild(inputs)
    n, k, columns = a.input.shape[0], a.positions, a.linear_weight.shape[0]
    rows = a.input.new_empty((n, k), dtype=a.compute_dtype)
    logits = a.input.new_empty((0,))
    if strategy == "materialize":
        logits = products.fake_buffer(n, columns, a.input.dtype, a.input.device)
    return (
        rows.new_empty(()) if reduce else rows,
        torch.empty_like(rows),
        rows.new_empty((n, k) if with_prediction else (0,), dtype=torch.int64),
        rows.new_empty((2, n, k)),
        logits,
        *(_like(a, name, strategy == "chunked" and with_grad and need) for name, need in zip(_OWN, needs, strict=True)),
    )


def _like(a: Arguments, name: str, wanted: bool) -> Tensor:
    value = getattr(a if name in _OWN else a.options, name)
    return value.new_empty(value.shape) if wanted else a.input.new_empty((0,))


def _gradients(
    overwrite: bool, grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, logits: Tensor | None, is_gradient: bool,
    *args: Any,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients.

    overwrite: whether kept logits may be turned into their gradient in place, and their gradient be scaled. Where the
    upstream gradient is 1, scaling touches no memory.
    """
    *inputs, strategy, memory_budget, with_prediction, needs, backend = args
    a = SIGNATURE.read(inputs)
    with torch.autocast(a.input.device.type, enabled=False):
        if strategy == "tiled":
            inverse_norm = a.inverse_norms()
            values: list[Tensor] = _tiled_module().backward(grad_loss, grad_lse, rest, a, inverse_norm, needs)
            if inverse_norm is not None and needs[1]:
                products.project_(values[1], a.linear_weight, inverse_norm, False)
            return values
        head = chunked.Head(a, load(ROWS, backend), with_prediction and logits is not None)
        if is_gradient:
            assert logits is not None
            times_upstream = partial(scale_, factor=grad_loss, backend=backend)
            if overwrite:
                times_upstream(products.memory_of(logits))
            gradients = chunked.Gradients(head, needs)
            gradients.add_rows(logits, slice(0, head.n), None if overwrite else times_upstream)
            return gradients.finished()
        if strategy == "materialize":
            return chunked.backward_rows(head, head.n, logits, overwrite, grad_loss, grad_lse, rest, needs)
        plan = chunk_plan(sizes(a, True, False, any(needs[3:])), memory_budget)
        if plan.by == "rows":
            return chunked.backward_rows(head, plan.chunk, None, True, grad_loss, grad_lse, rest, needs)
        return chunked.backward_classes(head, plan.chunk, grad_loss, grad_lse, rest, needs)


def _backward_fake(grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, *args: Any) -> list[Tensor]:
    _, _, *inputs, _, _, _, needs, _ = args
    a = SIGNATURE.rebuild(inputs)
    return [_like(a, name, need) for name, need in zip(DIFFERENTIABLE, needs, strict=True)]


def eager(*args: Any) -> tuple[Tensor, ...]:
    """Forward on the reference backend with all logits, for autograd, forward mode and ``torch.func`` to go through."""
    *inputs, _, _, reduce, with_prediction, _, _, _ = args
    a = SIGNATURE.read(inputs)
    with torch.autocast(a.input.device.type, enabled=False):
        weight = a.linear_weight.to(a.input.dtype)
        if a.normalize:
            weight = F.normalize(weight.to(a.compute_dtype), dim=1).to(a.input.dtype)
        logits = F.linear(a.input, weight, None if a.linear_bias is None else a.linear_bias.to(a.input.dtype))
        rows = RowArguments(logits.unflatten(1, (a.classes, a.positions)), a.options)
        results = eager_rows(rows, reduce, with_prediction)
    return (*results[:4], *(a.input.new_empty((0,)) for _ in range(1 + len(_OWN))))


FORWARD = define(
    f"{OP}_fwd({SIGNATURE.schema}, str strategy, int memory_budget, bool reduce, bool with_prediction, bool with_grad,"
    " bool[] needs, str backend) -> (Tensor loss, Tensor lse, Tensor prediction, Tensor rest, Tensor logits,"
    " Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _forward,
    _forward_fake,
)
_AFTER_LOGITS = (
    f"bool is_gradient, {SIGNATURE.schema}, str strategy, int memory_budget, bool with_prediction, bool[] needs,"
    " str backend) -> Tensor[]"
)
BACKWARD = define(
    f"{OP}_bwd(Tensor grad_loss, Tensor? grad_lse, Tensor rest, Tensor? logits, {_AFTER_LOGITS}",
    partial(_gradients, False),
    _backward_fake,
)
# The same, which turns the logits that forward kept into their gradient, or scales the gradient that it kept. Only
# called where no graph is recorded.
define(
    f"{OP}_bwd_(Tensor grad_loss, Tensor? grad_lse, Tensor rest, Tensor(a!) logits, {_AFTER_LOGITS}",
    partial(_gradients, True),
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, strategy, memory_budget, _, with_prediction, with_grad, needs, backend = inputs
    _, _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    tensors, ctx.others = SIGNATURE.split(arguments)
    ctx.settings = (strategy, memory_budget, with_prediction)
    ctx.backend = backend
    ctx.needs = SIGNATURE.needs(ctx.needs_input_grad[1:])
    _, rest, logits, *grads = others
    same_needs = ctx.needs[: len(_OWN)] == list(needs) and not any(ctx.needs[len(_OWN) :])
    ctx.gradients = ReadyGradient(strategy == "chunked" and with_grad and same_needs)
    ctx.logits = _KeptLogits(strategy == "materialize", with_grad)
    ctx.save_for_backward(*tensors, rest, *([logits] if ctx.logits.kept else grads if ctx.gradients.ready else []))


class _KeptLogits:
    """The logits that "materialize" keeps, or their gradient. The first backward pass may overwrite them."""

    def __init__(self, kept: bool, are_gradient: bool) -> None:
        self.kept, self.are_gradient, self.spent = kept, are_gradient, False

    def usable(self, scalar: bool) -> bool:
        """Return whether backward can start from them, given whether the upstream gradient is one factor."""
        return self.kept and not self.spent and (scalar or not self.are_gradient)

    def may_be_spent(self, logits: Tensor, upstream: Tensor) -> bool:
        """Return whether this pass may overwrite them. A scaled float16 gradient might leave the range."""
        return spends_in_place(upstream) and not (self.are_gradient and logits.dtype == torch.float16)


def _autograd_backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    saved, count = ctx.saved_tensors, SIGNATURE.n_tensors
    tensors, rest, kept = saved[:count], saved[count], saved[count + 1 :]
    gradients: dict[str, Tensor] = {}
    if grad_loss is None and grad_lse is None:
        return (*SIGNATURE.gradients(gradients), *[None] * 7)
    factor = grad_loss if grad_lse is None and grad_loss is not None and grad_loss.dim() == 0 else None
    if through_eager(ctx.backend, (grad_loss, grad_lse)):
        reduce = grad_loss is not None and grad_loss.dim() == 0
        arguments = [*SIGNATURE.join(tensors, ctx.others), *ctx.settings[:2], reduce, False, False, [], ctx.backend]
        return tuple(eager_gradients(eager, arguments, ctx.needs_input_grad[1:], [grad_loss, grad_lse]))
    if ctx.gradients.ready and factor is not None and not torch.is_grad_enabled():
        ready = ctx.gradients.take(kept, factor)
        for value in ready:
            scale_(value, factor, ctx.backend)
        values: Sequence[Tensor] = ready or [(value * factor).to(value.dtype) for value in kept]
    else:
        grad_loss = rest.new_zeros(()) if grad_loss is None else grad_loss
        logits, operator = None, torch.ops.lt_kernels.linear_margin_cross_entropy_bwd
        if ctx.logits.usable(factor is not None):
            (logits,) = kept
            if ctx.logits.may_be_spent(logits, grad_loss):
                ctx.logits.spent, operator = True, torch.ops.lt_kernels.linear_margin_cross_entropy_bwd_
                logits = logits.data
        values = operator(
            grad_loss, grad_lse, rest, logits, logits is not None and ctx.logits.are_gradient,
            *SIGNATURE.join(tensors, ctx.others), *ctx.settings, ctx.needs, ctx.backend,
        )  # fmt: skip
    # values of the linear layer's own arguments alone where forward computed them
    gradients = {name: value for name, value, need in zip(DIFFERENTIABLE, values, ctx.needs, strict=False) if need}
    return (*SIGNATURE.gradients(gradients), *[None] * 7)


register_autograd(FORWARD, _autograd_backward, _setup_context)
register_no_double_backward(BACKWARD)
forward = with_transforms(torch.ops.lt_kernels.linear_margin_cross_entropy_fwd.default, eager)
