"""The largest logits of a linear head and their log-sum-exp: inference, without storing the logits as a whole.

Input [N, D] (in the dtype of the product), linear_weight [C, D]; u_j = scale * x_j + class_shift_j with x the logits
(the cosines where ``normalize``). Logits of a block of rows and classes at a time are in a buffer, from which come

    rest      the rows' maximum and sum of exponentials so far, merged in the order of the blocks
    values    the k largest u so far, and their classes

and nothing else is kept. Each block is one matrix product and one call of the fusion (``expert_fusion``) of one expert,
whose probabilities are the result where a block has all classes.
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
from .._select import GROUPS, group_size
from .._select import largest_of_all as _largest
from ..expert_fusion.arguments import Arguments as FusionArguments
from ..expert_fusion.op import OP as FUSION

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


def _linear_topk(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, k, buffer, backend = args
    with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):  # dtypes have been chosen
        return _in_blocks(SIGNATURE.read(inputs), k, buffer, backend)


def _in_blocks(a: Arguments, k: int, buffer: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide = a.input.dtype, compute_dtype(a.input.dtype)
    n, classes = a.input.shape[0], a.linear_weight.shape[0]
    apart = a.normalize and wide != dtype  # the logits' own dtype is too narrow for what is done to them
    # the fusion of some backends writes its logits again for several classes
    element = dtype.itemsize + (wide.itemsize if apart or k > 1 else 0)
    block_rows, block, _ = blocks(n, classes, k, element, buffer)
    room = products.empty(min(block_rows, n), min(block, classes), dtype, a.input.device)
    whole = [
        _of_rows(a._replace(input=a.input[begin : begin + block_rows]), room, block, k, backend)
        for begin in range(0, n, block_rows)
    ]
    if len(whole) == 1:
        return whole[0]
    results = _results(a.input, k)
    for begin, parts in zip(range(0, n, block_rows), whole, strict=True):
        for result, part in zip(results, parts, strict=True):
            result[begin : begin + block_rows] = part
    return results


def _of_rows(a: Arguments, room: Tensor, block: int, k: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the classes, their probabilities and the log-sum-exp of rows whose logits are ``block`` classes at a time
    in ``room``."""
    classes, count, wide = a.linear_weight.shape[0], a.input.shape[0], compute_dtype(a.input.dtype)
    if block >= classes:
        values, found, lse, _ = _fused(a, slice(0, classes), room, k, True, backend)
        return found, values, lse
    rest = torch.zeros(2, count, 1, dtype=wide, device=a.input.device)
    values = rest.new_empty((count, 0))
    found = torch.empty_like(values, dtype=torch.int64)
    for start in range(0, classes, block):
        columns = slice(start, min(start + block, classes))
        here, places, mass, _ = _fused(a, columns, room, min(k, columns.stop - start), False, backend)
        nowhere = here[:, :1] == -math.inf
        products.merge(rest, here[:, :1].masked_fill(nowhere, 0.0), mass[:, None].masked_fill(nowhere, 0.0))
        values, found = torch.cat([values, here], 1), torch.cat([found, places + start], 1)
        if start > 0:
            values, chosen = _largest(values, min(k, values.shape[1]))
            found = found.gather(1, chosen)
    return found, (values - rest[0]).exp() / rest[1], (rest[0] + rest[1].log())[:, 0]


def _fused(a: Arguments, columns: slice, room: Tensor, k: int, normalize: bool, backend: str) -> Any:
    """Return the results of the fusion of one expert, whose logits are those of some classes."""
    w = a.linear_weight[columns].to(a.input.dtype)
    z = room[: a.input.shape[0], : columns.stop - columns.start]
    products.logits_into(z, a.input, w, None if a.linear_bias is None else a.linear_bias[columns])
    if a.normalize:
        z = z * products.inverse_norms(w, compute_dtype(z.dtype))
    shift = None if a.class_shift is None else a.class_shift[columns]
    return load(FUSION, backend).forward(
        FusionArguments([z], None, shift, a.learned_scale, [1.0], a.scale, normalize), k, False
    )


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
