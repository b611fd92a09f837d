"""Rows' scalars before and after the sweeps, in one launch each: results from statistics, terms from gradients.

``op.py`` does the same in a dozen operators of torch; one launch takes a GPU as long as a small sweep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._rows.triton_math import INF, load_scale
from ..._rows.triton_options import per_row
from ..arguments import N_SLOPES, N_TERMS
from .keys import NEG_SLOPE, NUM_POS, POS_SUM

_LAUNCH = {"BLOCK": 128, "num_warps": 4}


@triton.jit(do_not_specialize=["rows"])
def partitioned_logsumexp_results_kernel(
    statistics_ptr,  # [6 or 8, N], statistics_stride apart
    learned_scale_ptr,  # 0-dim
    neg_ptr,  # [N], like the three that follow
    pos_ptr,
    pos_sum_ptr,
    num_pos_ptr,
    rest_ptr,  # [4, N]
    slopes_ptr,  # [3, N]; None where not wanted
    rows,
    statistics_stride,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    size = tl.cast(rows, tl.int64)
    from_ptr = statistics_ptr + row
    stride = tl.cast(statistics_stride, tl.int64)
    for side in tl.static_range(2):
        peak = tl.load(from_ptr + 2 * side * stride, mask=inside, other=0.0)
        mass = tl.load(from_ptr + (2 * side + 1) * stride, mask=inside, other=0.0)
        tl.store(rest_ptr + 2 * side * size + row, peak, mask=inside)
        tl.store(rest_ptr + (2 * side + 1) * size + row, mass, mask=inside)
        result = tl.where(mass == 0.0, -INF, peak + tl.log(mass))
        tl.store((neg_ptr if side == 0 else pos_ptr) + row, result, mask=inside)
        if slopes_ptr is not None:
            weighted = tl.load(from_ptr + (NEG_SLOPE + side) * stride, mask=inside, other=0.0)
            tl.store(slopes_ptr + side * size + row, tl.where(mass == 0.0, 0.0, weighted / mass), mask=inside)
    products = tl.load(from_ptr + POS_SUM * stride, mask=inside, other=0.0)
    if slopes_ptr is not None:
        tl.store(slopes_ptr + 2 * size + row, products, mask=inside)
    tl.store(pos_sum_ptr + row, load_scale(scale, learned_scale_ptr) * products, mask=inside)
    tl.store(num_pos_ptr + row, tl.load(from_ptr + NUM_POS * stride, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def partitioned_logsumexp_terms_kernel(
    grad_neg_ptr,  # [N] or 0-dim (stride 0); None: no gradient, like the two that follow
    grad_pos_ptr,
    grad_sum_ptr,
    rest_ptr,  # [4, N]
    terms_ptr,  # [5, N]
    rows,
    grad_neg_stride,
    grad_pos_stride,
    grad_sum_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    size = tl.cast(rows, tl.int64)
    for side in tl.static_range(2):
        peak = tl.load(rest_ptr + 2 * side * size + row, mask=inside, other=0.0)
        factor = tl.zeros([BLOCK], tl.float32)
        if (grad_neg_ptr if side == 0 else grad_pos_ptr) is not None:
            mass = tl.load(rest_ptr + (2 * side + 1) * size + row, mask=inside, other=0.0)
            if side == 0:
                upstream = tl.load(grad_neg_ptr + row * grad_neg_stride, mask=inside, other=0.0)
            else:
                upstream = tl.load(grad_pos_ptr + row * grad_pos_stride, mask=inside, other=0.0)
            factor = tl.where(mass == 0.0, 0.0, upstream / mass)
        tl.store(terms_ptr + 2 * side * size + row, peak, mask=inside)
        tl.store(terms_ptr + (2 * side + 1) * size + row, factor, mask=inside)
    of_sum = tl.zeros([BLOCK], tl.float32)
    if grad_sum_ptr is not None:
        of_sum += tl.load(grad_sum_ptr + row * grad_sum_stride, mask=inside, other=0.0)
    tl.store(terms_ptr + POS_SUM * size + row, of_sum, mask=inside)


def results(statistics: Tensor, learned_scale: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """Return neg, pos, pos_sum, num_pos [N], rest [4, N], slopes [3, N] ([0] without their statistics)."""
    kinds, n = statistics.shape
    neg, pos, pos_sum, num_pos = (statistics.new_empty((n,)) for _ in range(4))
    rest = statistics.new_empty((4, n))
    with_slopes = kinds > NEG_SLOPE.value
    slopes = statistics.new_empty((1 + N_SLOPES, n) if with_slopes else (0,))
    if n > 0:
        with torch.cuda.device_of(statistics):
            partitioned_logsumexp_results_kernel[(triton.cdiv(n, _LAUNCH["BLOCK"]),)](
                statistics, learned_scale, neg, pos, pos_sum, num_pos, rest, slopes if with_slopes else None, n,
                statistics.stride(0), scale, **_LAUNCH,
            )  # fmt: skip
    return neg, pos, pos_sum, num_pos, rest, slopes


def terms(grad_neg: Tensor | None, grad_pos: Tensor | None, grad_sum: Tensor | None, rest: Tensor) -> Tensor:
    """Return the terms of ``Block.backward`` [5, N]."""
    n = rest.shape[1]
    out = rest.new_empty((N_TERMS, n))
    if n > 0:
        grads = [per_row(grad, rest.shape[1:]) for grad in (grad_neg, grad_pos, grad_sum)]
        with torch.cuda.device_of(rest):
            partitioned_logsumexp_terms_kernel[(triton.cdiv(n, _LAUNCH["BLOCK"]),)](
                *(grad for grad, _ in grads), rest, out, n, *(stride for _, stride in grads), **_LAUNCH
            )
    return out
