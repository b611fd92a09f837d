"""Schema and shapes of the experts' fusion at inference; nothing is differentiable.

With u_j = scale * sum over experts e of weights_e * x_ej + class_shift_j, of every sample:

    values      [N, k] the k largest u, in the compute dtype, largest first; of equal ones the lowest class first; NaN
                counts as the largest
    classes     [N, k] int64, theirs
    mass        [N] sum of exp(u - largest u); NaN where the largest u is infinite or NaN, as in log_softmax
    log_probs   [N, C] log_softmax of u in the compute dtype; [0] unless asked for

With ``normalize``, ``values`` are exp(u - largest u) / mass, and ``mass`` is the log-sum-exp of u.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import load
from .._experts import shape_of
from .._registry import define, with_transforms
from .arguments import SIGNATURE
from .fused import fused, normalized

OP = "expert_fusion"

Result = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(*args: Any) -> Result:
    *inputs, k, with_log_probs, backend = args
    with torch.no_grad():
        result: Result = load(OP, backend).forward(SIGNATURE.read(inputs), k, with_log_probs)
    return result


def _fake(*args: Any) -> Result:
    *inputs, k, with_log_probs, _ = args
    a = SIGNATURE.rebuild(inputs)
    _, n, c = shape_of(a.logits)
    values = a.logits[0].new_empty((n, k), dtype=a.compute_dtype)
    return (
        values,
        torch.empty_like(values, dtype=torch.int64),
        values.new_empty((n,)),
        values.new_empty((n, c) if with_log_probs else (0,)),
    )


def _with_torch(*args: Any) -> Result:
    """The same for exporters. Equal values come in the order of their top-k operator."""
    *inputs, k, with_log_probs, _ = args
    a = SIGNATURE.trace(inputs)
    u = fused(a)
    values, classes = u.topk(k, 1)
    mass = (u - values[:, :1]).exp().sum(1)
    if a.normalize:
        values, mass = normalized(values, mass)
    return values, classes, mass, u.log_softmax(1) if with_log_probs else u.new_empty((0,))


define(
    f"{OP}({SIGNATURE.schema}, int k, bool with_log_probs, str backend)"
    " -> (Tensor values, Tensor classes, Tensor mass, Tensor log_probs)",
    _forward,
    _fake,
    _with_torch,
)
forward = with_transforms(torch.ops.lt_kernels.expert_fusion.default, _forward)
