"""Schema, shapes, autograd and strategies of the partitioned log-sum-exp.

Similarities s_ij = a <q_i, k_j>, a = scale * learned_scale; logits u_ij = key_scale_j s_ij + key_bias_j. Of row i, over
the columns that are not left out by ``exclude``:

    neg_i     = log sum of exp(u_ij) over the keys of another label        -inf where there are none
    pos_i     = log sum of exp(u_ij) over the keys of the same label       -inf where there are none
    pos_sum_i = sum of s_ij over the keys of the same label
    num_pos_i = how many these are

Given upstream gradients (gn, gp, gs), with G_ij = gp_i exp(u_ij - pos_i) for the same label and gn_i exp(u_ij - neg_i)
for another, dS_ij = key_scale_j G_ij + [same label] gs_i:

    dQ = a dS K    dK = a dS^T Q    dkey_bias_j = sum_i G_ij    dkey_scale_j = sum_i G_ij s_ij

Where the scale learns, forward also takes ``slopes`` [3, N], the derivatives of (neg, pos, pos_sum) with respect to a:
the means of key_scale_j <q_i, k_j> under the softmax of each side, and the sum of <q_i, k_j>. They cost a multiply-add
per logit and no pass of their own. ``rest`` [4, N] is what backward needs: of each side the largest logit and the sum
of exponentials relative to it (0, 0 where it has none), apart because their logarithm's sum loses digits. With
``separate`` the results (neg, pos, pos_sum) come twice: gradients of the first reach everything but the scale, those of
``of_scale`` [3, N] the scale alone.

Strategies are those of ``plan.py``; "materialize" keeps the products <q_i, k_j> in ``products`` ([0] otherwise). No
N x M mask exists anywhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._backend import load
from .._gemm import products
from .._reduce import ordered_sum
from .._registry import (
    define,
    eager_gradients,
    register_autograd,
    register_no_double_backward,
    through_eager,
    with_transforms,
)
from . import chunked
from .arguments import (
    DIFFERENTIABLE,
    NEG_MASS,
    NEG_PEAK,
    NEG_SLOPE,
    NUM_POS,
    POS_MASS,
    POS_PEAK,
    POS_SUM,
    SIGNATURE,
    Arguments,
    Block,
)
from .plan import blocks

OP = "partitioned_logsumexp"


def _blocks(a: Arguments, memory_budget: int) -> Any:
    return blocks(a.query.shape[0], a.keys.shape[0], a.query.dtype, a.query.device.type, memory_budget)


def _room_for_products(a: Arguments, strategy: str, like: Any) -> Tensor:
    n, m, dtype = a.query.shape[0], a.keys.shape[0], a.query.dtype
    if strategy != "materialize":
        return a.query.new_empty((0,))
    room: Tensor = like(n, m, dtype, a.query.device)
    return room


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, with_slopes, separate, strategy, memory_budget, backend = args
    a = SIGNATURE.read(inputs)
    with torch.autocast(a.query.device.type, enabled=False):  # dtypes have been chosen
        kept = _room_for_products(a, strategy, products.buffer)
        if strategy == "tiled":
            s = load(OP, "triton").tiled_forward(a, with_slopes)
        else:
            kernels = load(OP, backend)
            s = chunked.forward(
                a, kernels, _blocks(a, memory_budget), with_slopes, kept if strategy == "materialize" else None
            )
    if backend == "triton":
        results = load(OP, "triton").results(s, a.learned_scale, a.scale)
    else:
        results = _results(s, a)
    return (*results, kept, torch.stack(results[:3]) if separate else s.new_empty((0,)))


def _results(s: Tensor, a: Arguments) -> tuple[Tensor, ...]:
    rest = s[:4]  # NEG_PEAK, NEG_MASS, POS_PEAK, POS_MASS
    peaks, masses = rest[::2], rest[1::2]
    none = masses == 0
    # the logarithm of nothing is to have no slope in the reference's second derivatives
    neg, pos = torch.where(none, -math.inf, peaks + masses.masked_fill(none, 1.0).log()).unbind(0)
    slopes = s.new_empty((0,))
    if len(s) > NEG_SLOPE:
        means = torch.where(none, 0.0, s[NEG_SLOPE:] / masses)
        slopes = torch.cat([means, s[POS_SUM : POS_SUM + 1]])
    scale = a.scale if a.learned_scale is None else a.scale * a.learned_scale
    # an operator's outputs are distinct
    return neg, pos.clone(), scale * s[POS_SUM], s[NUM_POS].clone(), rest.clone(), slopes


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, with_slopes, separate, strategy, _, _ = args
    a = SIGNATURE.rebuild(inputs)
    n = a.query.shape[0]
    row = a.query.new_empty((n,), dtype=a.compute_dtype)

    return (
        row, *(torch.empty_like(row) for _ in range(3)), row.new_empty((4, n)),
        row.new_empty((3, n) if with_slopes else (0,)), _room_for_products(a, strategy, products.fake_buffer),
        row.new_empty((3, n) if separate else (0,)),
    )  # fmt: skip


def _backward(
    grad_neg: Tensor | None, grad_pos: Tensor | None, grad_sum: Tensor | None, grad_of_scale: Tensor | None,
    rest: Tensor, slopes: Tensor, kept: Tensor | None, *args: Any,
) -> list[Tensor]:  # fmt: skip
    *inputs, separate, strategy, memory_budget, all_needs, backend = args
    *needs, need_scale = all_needs
    a = SIGNATURE.read(inputs)
    upstream = (grad_neg, grad_pos, grad_sum)
    of_scale = rest.new_empty((0,))
    if need_scale:
        through = upstream if not separate else (None,) * 3 if grad_of_scale is None else grad_of_scale.unbind(0)
        of_scale = a.scale * _of_scale(through, slopes, rest)
    if not any(needs):
        return [*(a.query.new_empty((0,)) for _ in needs), of_scale]
    terms = load(OP, "triton").terms(*upstream, rest) if backend == "triton" else _terms(*upstream, rest)
    with torch.autocast(a.query.device.type, enabled=False):
        if strategy == "tiled":
            grads: list[Tensor] = load(OP, "triton").tiled_backward(a, terms, needs)
        else:
            both = [needs[0], needs[0] if a.key is None else needs[1], *needs[2:]]
            grads = chunked.backward(a, load(OP, backend), _blocks(a, memory_budget), terms, both, kept)
            if a.key is None and needs[0]:
                grads[0], grads[1] = grads[0] + grads[1], a.query.new_empty((0,))
    return [*grads, of_scale]


def _of_scale(upstream: tuple[Tensor | None, ...], slopes: Tensor, rest: Tensor) -> Tensor:
    """The gradient of a, 0-dim. Of a side without keys it is 0, whatever the upstream gradient (NaN where both are)."""
    sides = (rest[NEG_MASS] != 0, rest[POS_MASS] != 0, None)
    total = rest.new_zeros(())
    for grad, slope, some in zip(upstream, slopes, sides, strict=True):
        if grad is not None:
            part = grad * slope
            total = total + ordered_sum(part if some is None else torch.where(some, part, 0.0))
    return total


def _terms(grad_neg: Tensor | None, grad_pos: Tensor | None, grad_sum: Tensor | None, rest: Tensor) -> Tensor:
    """Of ``Block.backward``."""
    zero = torch.zeros_like(rest[0])

    def over_mass(grad: Tensor | None, mass: Tensor) -> Tensor:
        return zero if grad is None else torch.where(mass == 0, zero, grad / mass)

    return torch.stack(
        [
            rest[NEG_PEAK], over_mass(grad_neg, rest[NEG_MASS]),
            rest[POS_PEAK], over_mass(grad_pos, rest[POS_MASS]),
            zero if grad_sum is None else grad_sum,
        ]
    )  # fmt: skip


def _backward_fake(*args: Any) -> list[Tensor]:
    *inputs, _, _, _, needs, _ = args[7:]
    a = SIGNATURE.rebuild(inputs)
    values = [getattr(a, name) for name in DIFFERENTIABLE]
    return [
        a.query.new_empty((0,))
        if value is None or not need
        else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, need in zip(values, needs, strict=True)
    ]


def eager(*args: Any) -> tuple[Tensor, ...]:
    """Forward on the reference backend in one block, for autograd, forward mode and ``torch.func`` to go through."""
    *inputs, _, separate, _, _, _ = args
    a = SIGNATURE.read(inputs)
    if a.key is not None:
        learning = slice(a.key_grad_begin, a.key_grad_end)
        queue = a.key.detach()
        a = a._replace(key=torch.cat([queue[: learning.start], a.key[learning], queue[learning.stop :]]))
    none = a.query.new_empty((0,))
    if not separate:
        return (*_eager_results(a), none, none)
    assert a.learned_scale is not None
    fixed = {name: getattr(a, name) for name in DIFFERENTIABLE if name != "learned_scale"}
    fixed = {name: None if value is None else value.detach() for name, value in fixed.items()}
    of_scale = _eager_results(a._replace(**fixed))
    results = _eager_results(a._replace(learned_scale=a.learned_scale.detach()))
    return (*results, none, torch.stack(of_scale[:3]))


def _eager_results(a: Arguments) -> tuple[Tensor, ...]:
    with torch.autocast(a.query.device.type, enabled=False):
        block = Block(
            a.query @ a.keys.t(), a.query_label, a.key_label, a.exclude, 0, a.key_bias, a.key_scale, a.learned_scale,
            a.scale,
        )  # fmt: skip
    return _results(load(OP, "reference").forward(block, False), a)


FORWARD = define(
    f"{OP}_fwd({SIGNATURE.schema}, bool with_slopes, bool separate, str strategy, int memory_budget, str backend)"
    " -> (Tensor neg, Tensor pos, Tensor pos_sum, Tensor num_pos, Tensor rest, Tensor slopes, Tensor products,"
    " Tensor of_scale)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    f"{OP}_bwd(Tensor? grad_neg, Tensor? grad_pos, Tensor? grad_sum, Tensor? grad_of_scale, Tensor rest, Tensor slopes,"
    f" Tensor? products, {SIGNATURE.schema}, bool separate, str strategy, int memory_budget, bool[] needs, str backend)"
    " -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, _, separate, strategy, memory_budget, backend = inputs
    *_, num_pos, rest, slopes, kept, of_scale = output
    ctx.mark_non_differentiable(num_pos, rest, slopes, kept, *([] if separate else [of_scale]))
    ctx.set_materialize_grads(False)
    ctx.needs = SIGNATURE.needs(ctx.needs_input_grad[1:])
    tensors, ctx.others = SIGNATURE.split(arguments)
    ctx.settings = (separate, strategy, memory_budget)
    ctx.kept, ctx.backend = strategy == "materialize", backend
    ctx.save_for_backward(*tensors, rest, slopes, *([kept] if ctx.kept else []))


def saved_tensors(ctx: Any, op: str) -> tuple[Tensor, ...]:
    """Return the saved tensors of an operator; say what to do if one was written since."""
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{op}: got an input that was written in place before backward, as an enqueue writes a queue's features, "
            "expected the same values. Enqueue before the loss or after its backward, or give the loss queue.snapshot()"
        ) from error
    return saved


def _autograd_backward(
    ctx: Any, grad_neg: Tensor | None, grad_pos: Tensor | None, grad_sum: Tensor | None, *others: Any
) -> tuple[Tensor | None, ...]:
    saved = saved_tensors(ctx, OP)
    count = SIGNATURE.n_tensors
    tensors, rest, slopes = saved[:count], saved[count], saved[count + 1]
    kept = saved[count + 2] if ctx.kept else None
    separate, of_scale = ctx.settings[0], others[-1]
    of_features = any(grad is not None for grad in (grad_neg, grad_pos, grad_sum))
    needs = [need and of_features for need in ctx.needs]
    if separate:
        needs[-1] = ctx.needs[-1] and of_scale is not None
    if through_eager(ctx.backend, (grad_neg, grad_pos, grad_sum, of_scale)):
        arguments = [*SIGNATURE.join(tensors, ctx.others), False, *ctx.settings, ctx.backend]
        upstream = [grad_neg, grad_pos, grad_sum, *others]
        return tuple(eager_gradients(eager, arguments, ctx.needs_input_grad[1:], upstream))
    gradients: dict[str, Tensor] = {}
    if any(needs):
        values = torch.ops.lt_kernels.partitioned_logsumexp_bwd(
            grad_neg, grad_pos, grad_sum, of_scale, rest, slopes, kept, *SIGNATURE.join(tensors, ctx.others),
            *ctx.settings, needs, ctx.backend,
        )  # fmt: skip
        gradients = {name: value for name, value, need in zip(DIFFERENTIABLE, values, needs, strict=True) if need}
    return (*SIGNATURE.gradients(gradients), *[None] * 5)


register_autograd(FORWARD, _autograd_backward, _setup_context)
register_no_double_backward(BACKWARD)
forward = with_transforms(torch.ops.lt_kernels.partitioned_logsumexp_fwd.default, eager)
