"""Losses as recipes: each chooses the class tensors of one paper and calls ``lt_kernels.functional``."""

from __future__ import annotations

from ._base import MarginCrossEntropyBase
from ._experts_base import ExpertLossBase
from .arcface import ArcFaceLoss
from .balanced_softmax import BalancedSoftmaxLoss
from .balpoe import BalPoELoss
from .cosface import CosFaceLoss
from .expert_head import ExpertHead
from .ldam import LDAMLoss
from .linear_head import LinearHead
from .logit_adjustment import LogitAdjustmentLoss, post_hoc_logit_adjustment
from .ncl import NCLLoss
from .ride import RIDELoss
from .sade import SADELoss, fit_expert_weights
from .vs import VSLoss

__all__ = [
    "ArcFaceLoss",
    "BalPoELoss",
    "BalancedSoftmaxLoss",
    "CosFaceLoss",
    "ExpertHead",
    "ExpertLossBase",
    "LDAMLoss",
    "LinearHead",
    "LogitAdjustmentLoss",
    "MarginCrossEntropyBase",
    "NCLLoss",
    "RIDELoss",
    "SADELoss",
    "VSLoss",
    "fit_expert_weights",
    "post_hoc_logit_adjustment",
]
