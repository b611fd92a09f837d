"""The rows kernel of any backend, expert by expert, and the ensemble's cross-entropy from a second read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._backend import load
from .._experts import empty_gradient
from ..expert_fusion.arguments import Arguments as FusionArguments
from ..expert_fusion.fused import fused
from ..margin_cross_entropy.op import OP as ROWS
from .arguments import Arguments

_FUSION = "expert_fusion"


def forward(
    a: Arguments, with_ensemble: bool, with_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    rows = a.rows()
    grad = empty_gradient(a.logits) if with_grad else a.logits[0].new_empty((0,))
    losses, rests = [], []
    for e, row in enumerate(rows):
        out = grad[e].unsqueeze(2) if with_grad else None
        loss, _, _, rest, _ = load(ROWS, backend).forward(row, False, with_grad, out=out)
        losses.append(loss[:, 0])
        rests.append(rest[:, :, 0])
    ensemble, prediction = ensemble_of(a, backend) if with_ensemble else (losses[0].new_empty((0,)),) * 2
    return torch.stack(losses), torch.stack(rests), ensemble, prediction.to(torch.int64), grad


def ensemble_of(a: Arguments, backend: str) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N] and prediction [N] of the mean of the experts' scaled logits."""
    experts = a.experts
    weights = [1.0 / len(experts)] * len(experts)
    fusion = FusionArguments(a.logits, None, None, a.options.learned_scale, weights, a.options.scale)
    peak, prediction, mass, _ = load(_FUSION, backend).forward(fusion, 1, False)
    loss = torch.zeros_like(mass)
    o = a.options
    share = o.mix_lambda if o.mix_lambda is None or o.mix_lambda.dim() == 0 else o.mix_lambda[:, 0]
    targets: list[tuple[Tensor, Any]] = [(o.target[:, 0], 1.0 if share is None else share)]
    if o.mixed_target is not None:
        assert share is not None
        targets.append((o.mixed_target[:, 0], 1 - share))
    for slot, (target, part) in enumerate(targets):
        valid = target != o.ignore_index
        bad = valid & ((target < 0) | (target >= experts[0].shape[1]))
        column = target.masked_fill(~valid | bad, 0)[:, None]
        own = fused(fusion._replace(logits=[x.gather(1, column) for x in experts]))[:, 0]
        factor = part * (mass.new_ones(()) if a.ensemble_coefficient is None else a.ensemble_coefficient[slot])
        term = torch.where(valid, (mass.log() - (own - peak[:, 0])).masked_fill(bad, math.nan), torch.zeros_like(mass))
        loss = loss + factor * term
    return loss, prediction[:, 0]
