"""The experts' fusion in eager PyTorch: the definition that the other backends are held to."""

from __future__ import annotations

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


def forward(a: Arguments, k: int, with_log_probs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    u = fused(a)
    values, classes = u.sort(dim=1, descending=True, stable=True)
    peak = values[:, 0]  # an infinite one gives NaN, as in log_softmax
    mass = (u - peak[:, None]).exp().sum(1)
    log_probs = u.log_softmax(1) if with_log_probs else u.new_empty((0,))
    return values[:, :k].contiguous(), classes[:, :k].contiguous(), mass, log_probs
