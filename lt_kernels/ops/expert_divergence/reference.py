"""The divergences between experts in eager PyTorch: the definition that the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from .._experts import compute_dtype, empty_gradient, experts_of


def _scaled(logits: list[Tensor], class_scale: Tensor | None) -> Tensor:
    """u [E, N, C] in the compute dtype."""
    x = torch.stack([each.to(compute_dtype(logits)) for each in experts_of(logits)])
    return x if class_scale is None else x * class_scale


def _softmax_parts(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(u - maximum) and probabilities along the last axis."""
    peak = u.amax(-1)
    e = (u - peak[..., None]).exp()
    mass = e.sum(-1)
    return peak, mass, e / mass[..., None]


def _times(p: Tensor, difference: Tensor) -> Tensor:
    """p * difference; 0 where p is 0."""
    return torch.where(p == 0, torch.zeros_like(p), p * difference)


def forward(logits: list[Tensor], class_scale: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """See ``op.py``."""
    u = _scaled(logits, class_scale)
    experts = u.shape[0]
    peak, mass, p = _softmax_parts(u)
    lse = peak + mass.log()
    mean = u.mean(0)
    mean_peak, mean_mass, mean_p = _softmax_parts(mean)
    if kind == "to_mean":
        a = _times(mean_p, mean - u).sum(-1)
        value = a - (mean_peak + mean_mass.log()) + lse
    else:
        a = _times(p, experts * (u - mean)).sum(-1)
        value = a - experts * (lse - lse.mean(0))
    return value, torch.cat([peak, mass, a, mean_peak[None], mean_mass[None]])


def backward(
    grad: Tensor, saved: Tensor, logits: list[Tensor], class_scale: Tensor | None, kind: str, detach: bool
) -> Tensor:
    """Gradient of the logits [E, N, C]; see ``op.py``."""
    u = _scaled(logits, class_scale)
    experts = u.shape[0]
    a = saved[2 * experts : 3 * experts]
    mean = u.mean(0)
    g = grad[:, :, None]
    p = _softmax_parts(u)[2]
    if kind == "to_mean":
        mean_p = _softmax_parts(mean)[2]
        du = g * (p - mean_p)
        if not detach:
            through = _times(mean_p.expand_as(u), mean - u - a[:, :, None])
            du = du + (g * through).sum(0) / experts
    else:
        own = _times(p, experts * (u - mean) - a[:, :, None])
        du = g * own + p * g.sum(0) - (g * p).sum(0)
    dx = du if class_scale is None else du * class_scale
    return empty_gradient(logits).copy_(dx)
