"""The largest logits of a linear head and their log-sum-exp: inference, without storing the logits as a whole.

Input [N, D] (in the dtype of the product), linear_weight [C, D]; u_j = scale * x_j + class_shift_j with x the logits
(the cosines where ``normalize``). Logits of a block of rows and classes at a time are in a buffer, from which come

    rest      the rows' maximum and sum of exponentials so far, merged in the order of the blocks
    values    the k largest u so far, and their classes

and nothing else is kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import compute_dtype
from .._backend import load
from .._gemm import products
from .._registry import Signature, define
from .._rows.options import RowOptions
from .._select import GROUPS, group_size, largest
from .._select import largest_of_all as _largest
from ..margin_cross_entropy.arguments import Arguments as RowArguments
from ..margin_cross_entropy.op import OP as ROWS

OP = "linear_topk"
#: The buffer's bytes, unless ``set_memory_budget`` allows fewer: larger ones are no faster.
BUFFER = 64 * 2**20
#: Rows are cut where a block of all of them would have fewer classes than this.
_FEWEST_CLASSES = 4096


class Arguments(NamedTuple):
    """What makes the logits. ``functional`` validates."""

    input: Tensor  # [N, D]
    linear_weight: Tensor  # [C, D], any dtype
    linear_bias: Tensor | None  # [C], any dtype
    class_shift: Tensor | None  # [C], in the compute dtype
    learned_scale: Tensor | None  # 0-dim, multiplies `scale`
    scale: float
    normalize: bool


SIGNATURE = Signature(Arguments)


def blocks(rows: int, classes: int, k: int, element: int, buffer: int) -> tuple[int, int, int]:
    """Rows and classes of a block, and classes of a group.

    element: bytes per logit. buffer: bytes of a block, at most (but never less than one row of one group).
    """
    most = max(1, buffer // element)
    wide = -(-min(classes, _FEWEST_CLASSES) // GROUPS[0]) * GROUPS[0]
    block_rows = max(1, min(rows, most // wide))
    group = group_size(min(classes, most // block_rows), k)
    fitting = max(1, most // block_rows // group)  # groups
    groups = -(-classes // group)
    even = -(-groups // -(-groups // fitting))
    return block_rows, even * group, group


def _statistics(rows: Any, u: Tensor) -> Tensor:
    """Maximum and sum of exp(u - maximum) of each row, [2, n, 1], by the rows kernel."""
    nowhere = torch.full((u.shape[0], 1), -100, dtype=torch.int64, device=u.device)
    arguments = RowArguments(u[:, :, None], RowOptions(nowhere))
    rest: Tensor = rows.forward(arguments, False, False)[3]
    return rest


def _linear_topk(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, k, buffer, backend = args
    with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):  # dtypes have been chosen
        return _in_blocks(SIGNATURE.read(inputs), k, buffer, backend)


def _in_blocks(a: Arguments, k: int, buffer: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    input, linear_weight, linear_bias, class_shift, learned_scale, scale, normalize = a
    rows_kernel = load(ROWS, backend)
    dtype, device = input.dtype, input.device
    wide = compute_dtype(dtype)
    n, classes = input.shape[0], linear_weight.shape[0]
    changed = normalize or class_shift is not None or learned_scale is not None or scale != 1.0
    apart = changed and wide != dtype  # the logits' own dtype is too narrow for what is added to them
    element = dtype.itemsize + (wide.itemsize if apart else 0)
    block_rows, block, group = blocks(n, classes, k, element, buffer)
    room = products.empty(block_rows, block, dtype, device)
    wide_room = products.empty(block_rows, block, wide, device) if apart else room
    factor = torch.full((), scale, dtype=wide, device=device)
    if learned_scale is not None:
        factor = factor * learned_scale

    results = _results(input, k)
    for begin in range(0, n, block_rows):
        rows = slice(begin, min(begin + block_rows, n))
        x = input[rows]
        count = x.shape[0]
        rest = torch.zeros(2, count, 1, dtype=wide, device=device)
        values = torch.empty(count, 0, dtype=wide, device=device)
        found = torch.empty(count, 0, dtype=torch.int64, device=device)
        for start in range(0, classes, block):
            columns = slice(start, min(start + block, classes))
            size = columns.stop - start
            padded = -(-size // group) * group
            w = linear_weight[columns].to(dtype)
            z = room[:count, :size]
            products.logits_into(z, x, w, None if linear_bias is None else linear_bias[columns])
            u = wide_room[:count, :padded]
            if apart:
                u[:, :size].copy_(z)
            if changed:
                slope = factor
                if normalize:
                    slope = factor * products.inverse_norms(w, wide)
                u[:, :size].mul_(slope)
                if class_shift is not None:
                    u[:, :size].add_(class_shift[columns])
            u[:, size:].fill_(-math.inf)
            part = _statistics(rows_kernel, u[:, :size])
            products.merge(rest, part[0], part[1])
            here, places = largest(u, k, group)
            values = torch.cat([values, here.to(wide)], 1)
            found = torch.cat([found, places + start], 1)
            if start > 0:
                values, places = _largest(values, min(k, values.shape[1]))
                found = found.gather(1, places)
        results[0][rows] = found[:, :k]
        results[1][rows] = (values[:, :k] - rest[0]).exp() / rest[1]
        results[2][rows] = (rest[0] + rest[1].log())[:, 0]
    return results


def _results(input: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    confidence = input.new_empty((input.shape[0], k), dtype=compute_dtype(input.dtype))
    return torch.empty_like(confidence, dtype=torch.int64), confidence, confidence.new_empty((input.shape[0],))


def _fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(input, args[-3])


def _with_all_logits(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same of logits that are stored, for exporters. Equal logits come in the order of their top-k operator."""
    *inputs, k, _, _ = args
    input, linear_weight, linear_bias, class_shift, learned_scale, scale, normalize = SIGNATURE.trace(inputs)
    dtype, wide = input.dtype, compute_dtype(input.dtype)
    w = linear_weight.to(dtype)
    u = F.linear(input, w, None if linear_bias is None else linear_bias.to(dtype)).to(wide)
    if normalize:
        u = u / torch.linalg.vector_norm(w, dim=1, dtype=wide).clamp_min(products.EPS)
    u = u * scale if learned_scale is None else u * (scale * learned_scale)
    if class_shift is not None:
        u = u + class_shift
    values, classes = u.topk(k, 1)
    peak = values[:, :1]
    mass = (u - peak).exp().sum(1, keepdim=True)
    return classes, (values - peak).exp() / mass, (peak + mass.log())[:, 0]


define(
    f"{OP}({SIGNATURE.schema}, int k, int buffer, str backend) -> (Tensor classes, Tensor confidence, Tensor lse)",
    _linear_topk,
    _fake,
    _with_all_logits,
)
linear_topk = torch.ops.lt_kernels.linear_topk.default
