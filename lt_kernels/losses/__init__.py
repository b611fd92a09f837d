"""Losses as recipes: each chooses the class tensors of one paper and calls ``lt_kernels.functional``."""

from __future__ import annotations

from ._base import MarginCrossEntropyBase
from ._contrastive_base import ContrastiveLossBase
from ._experts_base import ExpertLossBase
from .arcface import ArcFaceLoss
from .balanced_contrastive import BalancedContrastiveLoss
from .balanced_softmax import BalancedSoftmaxLoss
from .balpoe import BalPoELoss
from .cosface import CosFaceLoss
from .elm import ELMLoss, ELMTerms
from .expert_head import ExpertHead
from .gml import GMLLoss, GMLTerms
from .ldam import LDAMLoss
from .linear_head import LinearHead
from .logit_adjustment import LogitAdjustmentLoss, post_hoc_logit_adjustment
from .ncl import NCLLoss
from .paco import PaCoLoss
from .pixels import PixelSample, sample_pixels
from .ride import RIDELoss
from .sade import SADELoss, fit_expert_weights
from .supcon import SupConLoss
from .vs import VSLoss

__all__ = [
    "ArcFaceLoss",
    "BalPoELoss",
    "BalancedContrastiveLoss",
    "BalancedSoftmaxLoss",
    "ContrastiveLossBase",
    "CosFaceLoss",
    "ELMLoss",
    "ELMTerms",
    "ExpertHead",
    "ExpertLossBase",
    "GMLLoss",
    "GMLTerms",
    "LDAMLoss",
    "LinearHead",
    "LogitAdjustmentLoss",
    "MarginCrossEntropyBase",
    "NCLLoss",
    "PaCoLoss",
    "PixelSample",
    "RIDELoss",
    "SADELoss",
    "SupConLoss",
    "VSLoss",
    "fit_expert_weights",
    "post_hoc_logit_adjustment",
    "sample_pixels",
]
