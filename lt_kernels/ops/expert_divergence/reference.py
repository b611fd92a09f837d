"""The divergences between experts in eager PyTorch: the definition that the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import compute_dtype
from .._experts import empty_gradient, experts_of


def _divided(logits: list[Tensor], temperature: Tensor | None) -> Tensor:
    """u [E, N, C] in the compute dtype."""
    x = torch.stack([each.to(compute_dtype(each.dtype)) for each in experts_of(logits)])
    return x if temperature is None else x / temperature


def _softmax_parts(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum, v = u - maximum, sum of exp(v) and probabilities along the last axis."""
    peak = u.detach().amax(-1)  # the value depends on no peak
    v = u - peak[..., None]
    e = v.exp()
    mass = e.sum(-1)
    return peak, v, mass, e / mass[..., None]


def _times(p: Tensor, difference: Tensor) -> Tensor:
    """p * difference; 0 where p is 0."""
    return p * difference.masked_fill(p == 0, 0.0)


def forward(logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool = False) -> tuple[Tensor, Tensor]:
    """See ``op.py``. ``detach``: for autograd, whether the mean is a constant."""
    u = _divided(logits, temperature)
    experts = u.shape[0]
    peak, v, mass, p = _softmax_parts(u)
    mean = u.mean(0)
    mean_peak, mean_v, mean_mass, mean_p = _softmax_parts(mean.detach() if detach else mean)
    if kind == "to_mean":
        a = _times(mean_p, mean_v - v).sum(-1)
        value = a + (mass / mean_mass).log()
    else:
        a = _times(p, experts * v - v.sum(0)).sum(-1)
        value = a + (mass / mass[:, None]).log().sum(1)
    return value, torch.cat([peak, mass, a, mean_peak[None], mean_mass[None]])


def backward(
    grad: Tensor, saved: Tensor, logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool
) -> Tensor:
    """Gradient of the logits [E, N, C]; see ``op.py``."""
    u = _divided(logits, temperature)
    experts = u.shape[0]
    a = saved[2 * experts : 3 * experts, :, None]
    g = grad[:, :, None]
    _, v, _, p = _softmax_parts(u)
    if kind == "to_mean":
        _, mean_v, _, mean_p = _softmax_parts(u.mean(0))
        du = g * (p - mean_p)
        if not detach:
            du = du + (g * _times(mean_p.expand_as(u), mean_v - v - a)).sum(0) / experts
    else:
        du = g * _times(p, experts * v - v.sum(0) - a) + p * g.sum(0) - (g * p).sum(0)
    dx = du if temperature is None else du / temperature
    return empty_gradient(logits).copy_(dx)
