"""Losses as recipes: each chooses the class tensors of one paper and calls ``lt_kernels.functional``."""

from __future__ import annotations

from ._base import MarginCrossEntropyBase
from .arcface import ArcFaceLoss
from .balanced_softmax import BalancedSoftmaxLoss
from .cosface import CosFaceLoss
from .ldam import LDAMLoss
from .linear_head import LinearHead
from .logit_adjustment import LogitAdjustmentLoss, post_hoc_logit_adjustment
from .vs import VSLoss

__all__ = [
    "ArcFaceLoss",
    "BalancedSoftmaxLoss",
    "CosFaceLoss",
    "LDAMLoss",
    "LinearHead",
    "LogitAdjustmentLoss",
    "MarginCrossEntropyBase",
    "VSLoss",
    "post_hoc_logit_adjustment",
]
