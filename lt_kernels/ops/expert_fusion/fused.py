"""The experts' fused logits in eager PyTorch: for the reference, and for a few columns on any backend."""

from __future__ import annotations

import math

from torch import Tensor

from .arguments import Arguments


def fused(a: Arguments) -> Tensor:
    """u [N, C] in the compute dtype."""
    total: Tensor | None = None
    for e, x in enumerate(a.experts):
        weight: float | Tensor = a.weights[e] if a.expert_weight is None else a.weights[e] * a.expert_weight[e]
        term = weight * x.to(a.compute_dtype)
        total = term if total is None else total + term
    assert total is not None
    u = total * a.scale if a.learned_scale is None else total * (a.scale * a.learned_scale)
    return u if a.class_shift is None else u + a.class_shift


def normalized(values: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the largest u of rows, [N, k], and the log-sum-exp, [N].

    Args:
        values: the k largest u, the largest first.
        mass: sum of exp(u - largest u).
    """
    peak = values[:, 0]
    lse = (peak + mass.log()).masked_fill(peak == -math.inf, -math.inf)
    return (values - values[:, :1]).exp() / mass[:, None], lse  # not exp(u - lse): that would round the log-sum-exp
