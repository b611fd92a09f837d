"""Backward of the divergences: one program per sample and tile. Bytes per sample (b = itemsize): 2 E C b."""
# ruff: noqa: RUF005 (Triton knows no starred tuples)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._experts import empty_gradient, shape_of
from ..._rows.triton_experts import contiguous_rows, expert_edge, expert_tile, layout_of, locate_rows, row_stride
from ..._rows.triton_math import affine, fast_exp
from .launch import backward_launch
from .tiles import add_up, divide, load_exponents, load_inverse, multiply


@triton.jit
def load_gradient(upstream_ptr, row_weight_ptr, row, offset, upstream_stride_n):
    """Load the upstream gradient of an expert's value."""
    grad = tl.load(upstream_ptr + offset + row * upstream_stride_n)
    if row_weight_ptr is not None:
        grad = grad * tl.load(row_weight_ptr + row)
    return grad


@triton.jit
def load_row_terms(
    upstream_ptr, row_weight_ptr, saved_ptr, row, rows, upstream_stride_e, upstream_stride_n, EXPERTS: tl.constexpr,
    PAIRWISE: tl.constexpr,
):  # fmt: skip
    """Load each expert's maximum, 1 / sum of exponentials, A and upstream gradient; and the mean's maximum and
    1 / sum of exponentials (not used where PAIRWISE)."""
    peaks = ()
    inverses = ()
    averages = ()
    grads = ()
    for e in tl.static_range(EXPERTS):
        peaks = peaks + (tl.load(saved_ptr + e * rows + row),)
        inverses = inverses + (1.0 / tl.load(saved_ptr + (EXPERTS + e) * rows + row),)
        averages = averages + (tl.load(saved_ptr + (2 * EXPERTS + e) * rows + row),)
        grads = grads + (load_gradient(upstream_ptr, row_weight_ptr, row, e * upstream_stride_e, upstream_stride_n),)
    mean_peak = tl.load(saved_ptr + 3 * EXPERTS * rows + row)
    mean_inverse = 1.0 / tl.load(saved_ptr + (3 * EXPERTS + 1) * rows + row)
    return peaks, inverses, averages, grads, mean_peak, mean_inverse


@triton.jit
def compute_gradients(us, terms, PAIRWISE: tl.constexpr, DETACH: tl.constexpr):
    """Return the gradients of every expert's u."""
    EXPERTS: tl.constexpr = len(us)
    peaks, inverses, averages, grads, mean_peak, mean_inverse = terms
    vs = ()
    for e in tl.static_range(EXPERTS):
        vs = vs + (us[e] - peaks[e],)
    dus = ()
    if PAIRWISE:
        total = add_up(vs)
        ps = ()
        shared = ()
        for e in tl.static_range(EXPERTS):
            ps = ps + (fast_exp(vs[e]) * inverses[e],)
            shared = shared + (grads[e] * ps[e],)
        subtracted = add_up(shared)
        for e in tl.static_range(EXPERTS):
            own = multiply(ps[e], (EXPERTS * vs[e] - total) - averages[e])
            dus = dus + (grads[e] * own + (ps[e] * add_up(grads) - subtracted),)
    else:
        mean = affine(add_up(us), 1.0 / EXPERTS, None) - mean_peak
        mean_p = fast_exp(mean) * mean_inverse
        through = tl.zeros_like(mean)
        if not DETACH:
            weighted = ()
            for e in tl.static_range(EXPERTS):
                weighted = weighted + (grads[e] * ((mean - vs[e]) - averages[e]),)
            through = multiply(mean_p, add_up(weighted) * (1.0 / EXPERTS))
        for e in tl.static_range(EXPERTS):
            du = grads[e] * (fast_exp(vs[e]) * inverses[e] - mean_p)
            dus = dus + (du if DETACH else du + through,)
    return dus


@triton.jit
def write_gradients(dus, grad_ptr, begins, first, offsets, mask, temperature_ptr, WIDE: tl.constexpr):
    if temperature_ptr is not None:
        inverse, rest = load_inverse(temperature_ptr, first, offsets, mask, WIDE, True)
    for e in tl.static_range(len(dus)):
        dx = dus[e]
        if temperature_ptr is not None:
            if grad_ptr.dtype.element_ty == tl.float32:
                dx = divide(dx, inverse, rest)
            else:  # about to be rounded anyway
                dx = dx * inverse
        tl.store(grad_ptr + begins[e] + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expert_divergence_backward_kernel(
    x_ptrs,  # E of [N, C], unit class stride
    temperature_ptr,  # [C]
    upstream_ptr,  # [E, N]
    row_weight_ptr,  # [N]
    saved_ptr,  # [3 E + 2, N]
    grad_ptr,  # [E, N, C], unit class stride
    classes,
    expert_stride,
    row_stride,
    upstream_stride_e,
    upstream_stride_n,
    grad_stride_e,
    grad_stride_n,
    PAIRWISE: tl.constexpr,
    DETACH: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Compute the gradients of all experts' logits, programs (row, tile); the one of tile 0 also does the edge."""
    EXPERTS: tl.constexpr = len(x_ptrs)
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    tile = tl.program_id(1)
    begins, bodies, head, groups = locate_rows(row, expert_stride, row_stride, classes, EXPERTS, GROUP)
    grad_begins, grad_bodies, _, _ = locate_rows(row, grad_stride_e, grad_stride_n, classes, EXPERTS, GROUP)
    terms = load_row_terms(
        upstream_ptr, row_weight_ptr, saved_ptr, row, rows, upstream_stride_e, upstream_stride_n, EXPERTS, PAIRWISE
    )
    if tile == 0:
        offsets, mask = expert_edge(head, groups, classes, GROUP, LANES)
        us = load_exponents(x_ptrs, begins, 0, offsets, mask, temperature_ptr, False)
        dus = compute_gradients(us, terms, PAIRWISE, DETACH)
        write_gradients(dus, grad_ptr, grad_begins, 0, offsets, mask, temperature_ptr, False)
    offsets, mask = expert_tile(tile * (REPEAT * LANES), groups, GROUP, LANES, REPEAT)
    us = load_exponents(x_ptrs, bodies, head, offsets, mask, temperature_ptr, GROUP >= 4)
    dus = compute_gradients(us, terms, PAIRWISE, DETACH)
    write_gradients(dus, grad_ptr, grad_bodies, head, offsets, mask, temperature_ptr, GROUP >= 4)


def backward(
    grad: Tensor,
    saved: Tensor,
    logits: list[Tensor],
    temperature: Tensor | None,
    kind: str,
    detach: bool,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the logits [E, N, C]; see ``op.py``."""
    e, n, classes = shape_of(logits)
    gradient = empty_gradient(logits)
    if n == 0:
        return gradient
    out = gradient if contiguous_rows(gradient) else gradient.new_empty(gradient.shape)
    experts = layout_of(logits, out)
    launch = backward_launch(e, classes, experts.group)
    grad = grad.to(torch.float32)
    with torch.cuda.device_of(logits[0]):
        expert_divergence_backward_kernel[(n, triton.cdiv(classes // launch.group * launch.group, launch.block) or 1)](
            experts.tensors,
            temperature,
            grad,
            row_weight,
            saved.contiguous(),
            out,
            classes,
            experts.expert_stride,
            experts.row_stride,
            grad.stride(0),
            grad.stride(1),
            out.stride(0) if e > 1 else 0,
            row_stride(out),
            PAIRWISE=kind == "pairwise",
            DETACH=detach,
            **launch.constants,
        )
    return gradient if out is gradient else gradient.copy_(out)
