"""Schema, shapes and autograd of a contrastive loss in one operator.

With a = scale * learned_scale and z_ij = <q_i, k_j>, over the keys j that row i does not leave out,

    u_ij   = a z_ij + key_bias_j, and pos_offset_i more where the labels are the same (a positive)
    D_i    = log[ sum over all keys of exp(u_ij) + exp(extra_i) ]
    P_i    = number of positives, S_i = sum over positives of a z_ij, w_i = beta + alpha P_i
    loss_i = D_i + constant_i - (pulled_i + alpha S_i) / w_i

or, with ``two`` softmaxes and no extra or pulled, loss_i = D_i - log[ sum over positives of exp(u_ij) / P_i ] +
constant_i. It is 0 where w_i = 0 (two: P_i = 0) and where the row does not count. With f_i what reaches loss_i,

    dS_ij = f_i (exp(u_ij - D_i) - [positive] alpha / w_i)    dQ = a dS K    dK = a dS^T Q
    dextra_i = f_i exp(extra_i - D_i)    dpulled_i = -f_i / w_i    da = sum of dS_ij z_ij

Forward gives backward ``terms`` [7, N], whose rows the backend knows, and ``share``, what a row counts in the result.
Beside the general ``partitioned_logsumexp``, from whose results the same losses can be composed, this operator has no
results of its own to pass from kernel to kernel: it is what GPUs run, in a few launches. Backends: Triton's only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import load
from .._gemm import products
from .._registry import define, register_autograd, register_no_double_backward
from ..partitioned_logsumexp.op import saved_tensors
from ..partitioned_logsumexp.plan import blocks
from .arguments import DIFFERENTIABLE, SIGNATURE, Arguments, terms_shape

OP = "contrastive_loss"


def _room_for_products(a: Arguments, strategy: str, like: Any) -> Tensor:
    if strategy != "materialize":
        return a.query.new_empty((0,))
    room: Tensor = like(a.query.shape[0], a.keys.shape[0], a.query.dtype, a.query.device)
    return room


def _blocks(a: Arguments, memory_budget: int) -> Any:
    return blocks(a.query.shape[0], a.keys.shape[0], a.query.dtype, a.query.device.type, memory_budget)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, with_slopes, strategy, memory_budget, backend = args
    a = SIGNATURE.read(inputs)
    with torch.autocast(a.query.device.type, enabled=False):  # dtypes have been chosen
        room = _room_for_products(a, strategy, products.buffer)
        kept = room if strategy == "materialize" else None
        made = load(OP, backend).forward(a, strategy, _blocks(a, memory_budget), with_slopes, kept)
    return (*made, room)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, strategy, _, _ = args
    a = SIGNATURE.rebuild(inputs)
    n, none = a.query.shape[0], a.reduction == "none"

    def new(*shape: Any) -> Tensor:
        return a.query.new_empty(shape, dtype=torch.float32)

    room = _room_for_products(a, strategy, products.fake_buffer)
    return new(n) if none else new(), new(*terms_shape(n)), new(0) if none else new(), room


def _backward(grad: Tensor, terms: Tensor, share: Tensor, kept: Tensor | None, *args: Any) -> list[Tensor]:
    *inputs, strategy, memory_budget, needs, backend = args
    a = SIGNATURE.read(inputs)
    with torch.autocast(a.query.device.type, enabled=False):
        found: list[Tensor] = load(OP, backend).backward(
            grad, a, terms, share, strategy, _blocks(a, memory_budget), kept, needs
        )
    return found


def _backward_fake(*args: Any) -> list[Tensor]:
    *inputs, _, _, needs, _ = args[4:]
    a = SIGNATURE.rebuild(inputs)
    values = [getattr(a, name) for name in DIFFERENTIABLE]
    return [
        a.query.new_empty((0,))
        if value is None or not need
        else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, need in zip(values, needs, strict=True)
    ]


FORWARD = define(
    f"{OP}_fwd({SIGNATURE.schema}, bool with_slopes, str strategy, int memory_budget, str backend)"
    " -> (Tensor loss, Tensor terms, Tensor share, Tensor products)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    f"{OP}_bwd(Tensor grad, Tensor terms, Tensor share, Tensor? products, {SIGNATURE.schema}, str strategy,"
    " int memory_budget, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, _, strategy, memory_budget, backend = inputs
    _, terms, share, kept = output
    ctx.mark_non_differentiable(terms, share, kept)
    ctx.set_materialize_grads(False)
    ctx.needs = SIGNATURE.needs(ctx.needs_input_grad[1:])
    tensors, ctx.others = SIGNATURE.split(arguments)
    ctx.settings = (strategy, memory_budget)
    ctx.kept, ctx.backend = strategy == "materialize", backend
    ctx.save_for_backward(*tensors, terms, share, *([kept] if ctx.kept else []))


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = saved_tensors(ctx, OP)
    count = SIGNATURE.n_tensors
    tensors, terms, share = saved[:count], saved[count], saved[count + 1]
    kept = saved[count + 2] if ctx.kept else None
    gradients: dict[str, Tensor] = {}
    if grad is not None and any(ctx.needs):
        values = torch.ops.lt_kernels.contrastive_loss_bwd(
            grad, terms, share, kept, *SIGNATURE.join(tensors, ctx.others), *ctx.settings, ctx.needs, ctx.backend
        )
        gradients = {name: value for name, value, need in zip(DIFFERENTIABLE, values, ctx.needs, strict=True) if need}
    return (*SIGNATURE.gradients(gradients), *[None] * 4)


register_autograd(FORWARD, _autograd_backward, _setup_context)
register_no_double_backward(BACKWARD)
forward = torch.ops.lt_kernels.contrastive_loss_fwd.default
