"""Fused losses for training classifiers on long-tailed labels with very many classes.

The losses are at top level; ``functional`` has the stateless form. ``queues`` keep keys for contrastive losses.
``priors``, ``schedules``, ``datasets`` and ``mixing`` are plain helpers, ``metrics`` needs torchmetrics, ``testing``
holds a kernel to float64.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from . import datasets, functional, losses, mixing, priors, queues, schedules
from ._info import info
from ._settings import set_checks, set_gradient_policy, set_memory_budget, use_backend
from ._version import __version__
from .functional import plan_linear
from .losses import (
    ArcFaceLoss,
    BalancedContrastiveLoss,
    BalancedSoftmaxLoss,
    BalPoELoss,
    CosFaceLoss,
    ELMLoss,
    ExpertHead,
    GMLLoss,
    LDAMLoss,
    LinearHead,
    LogitAdjustmentLoss,
    NCLLoss,
    PaCoLoss,
    RIDELoss,
    SADELoss,
    SupConLoss,
    VSLoss,
    fit_expert_weights,
    post_hoc_logit_adjustment,
    sample_pixels,
)
from .ops._backend import BackendUnavailableError
from .queues import ClassQueue, FeatureQueue, momentum_update

__all__ = [
    "ArcFaceLoss",
    "BackendUnavailableError",
    "BalPoELoss",
    "BalancedContrastiveLoss",
    "BalancedSoftmaxLoss",
    "ClassQueue",
    "CosFaceLoss",
    "ELMLoss",
    "ExpertHead",
    "FeatureQueue",
    "GMLLoss",
    "LDAMLoss",
    "LinearHead",
    "LogitAdjustmentLoss",
    "NCLLoss",
    "PaCoLoss",
    "RIDELoss",
    "SADELoss",
    "SupConLoss",
    "VSLoss",
    "__version__",
    "datasets",
    "fit_expert_weights",
    "functional",
    "info",
    "losses",
    "mixing",
    "momentum_update",
    "plan_linear",
    "post_hoc_logit_adjustment",
    "priors",
    "queues",
    "sample_pixels",
    "schedules",
    "set_checks",
    "set_gradient_policy",
    "set_memory_budget",
    "use_backend",
]

_ON_DEMAND = ("metrics", "testing")  # not imported with the package: they need, or are, more than training does


def __getattr__(name: str) -> ModuleType:
    if name in _ON_DEMAND:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
