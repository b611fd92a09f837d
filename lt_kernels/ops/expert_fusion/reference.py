"""The experts' fusion in eager PyTorch: the definition that the other backends are held to."""

from __future__ import annotations

from torch import Tensor

from .arguments import Arguments
from .fused import fused, normalized


def forward(a: Arguments, k: int, with_log_probs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    u = fused(a)
    values, classes = u.sort(dim=1, descending=True, stable=True)
    peak = values[:, 0]  # an infinite one gives NaN, as in log_softmax
    mass = (u - peak[:, None]).exp().sum(1)
    log_probs = u.log_softmax(1) if with_log_probs else u.new_empty((0,))
    values = values[:, :k].contiguous()
    if a.normalize:
        values, mass = normalized(values, mass)
    return values, classes[:, :k].contiguous(), mass, log_probs
