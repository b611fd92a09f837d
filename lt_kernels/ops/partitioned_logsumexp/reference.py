"""Blocks of similarities in eager PyTorch: the definition that other backends are held to (``arguments.Block``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import NEG_MASS, NEG_PEAK, POS_MASS, POS_PEAK, POS_SUM, Block


class _Logits:
    """u, z, and which columns are negative and positive; [n, m]."""

    def __init__(self, block: Block) -> None:
        dtype = block.compute_dtype
        self.z = block.z.to(dtype)
        self.scale = block.scale if block.learned_scale is None else block.scale * block.learned_scale
        self.key_scale = self.z.new_ones(self.z.shape[1]) if block.key_scale is None else block.key_scale
        self.u = (self.scale * self.key_scale) * self.z
        if block.key_bias is not None:
            self.u = self.u + block.key_bias
        same = block.query_label[:, None] == block.key_label[None, :]
        allowed = torch.ones_like(same)
        if block.exclude is not None:
            columns = torch.arange(block.first, block.first + same.shape[1], device=same.device)
            allowed = block.exclude[:, None] != columns
        self.negative, self.positive = ~same & allowed, same & allowed


def forward(block: Block, with_slopes: bool) -> Tensor:
    x = _Logits(block)
    statistics, slopes = [], []
    for side in (x.negative, x.positive):
        u = x.u.masked_fill(~side, -math.inf)
        peak = u.detach().amax(1) if u.shape[1] > 0 else u.new_full(u.shape[:1], -math.inf)
        peak = peak.masked_fill(peak == -math.inf, 0.0)
        exp = (u - peak[:, None]).exp()
        statistics += [peak, exp.sum(1)]
        slopes.append(torch.where(side, exp * x.key_scale * x.z, 0.0).sum(1))
    statistics += [x.z.masked_fill(~x.positive, 0.0).sum(1), x.positive.sum(1).to(x.z.dtype)]
    return torch.stack([*statistics, *slopes] if with_slopes else statistics)


def backward(block: Block, terms: Tensor, needs: list[bool], out: Tensor | None) -> tuple[Tensor, Tensor]:
    x = _Logits(block)
    gradient = torch.zeros_like(x.u)
    for side, peak, slope in ((x.negative, NEG_PEAK, NEG_MASS), (x.positive, POS_PEAK, POS_MASS)):
        u = x.u.masked_fill(~side, -math.inf)
        gradient = gradient + torch.where(side, terms[slope][:, None] * (u - terms[peak][:, None]).exp(), 0.0)
    if needs[0]:
        assert out is not None
        through_sum = torch.where(x.positive, terms[POS_SUM][:, None], 0.0)
        out.copy_(x.scale * (x.key_scale * gradient + through_sum))
    none = x.u.new_empty((0,))
    return (
        gradient.sum(0) if needs[1] else none,
        (gradient * (x.scale * x.z)).sum(0) if needs[2] else none,
    )
