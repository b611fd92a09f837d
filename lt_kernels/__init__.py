"""Fused losses for training classifiers on long-tailed labels with very many classes.

Every name of ``losses`` is at top level too; ``functional`` has the stateless form. ``queues`` keep keys for
contrastive losses. ``priors``, ``schedules``, ``datasets`` and ``mixing`` are plain helpers, ``metrics`` needs
torchmetrics, and ``testing`` holds a kernel to float64.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from . import datasets, functional, losses, mixing, priors, queues, schedules
from ._info import info
from ._settings import set_checks, set_gradient_policy, set_memory_budget, use_backend
from ._version import __version__
from .functional import plan_linear
from .losses import *  # noqa: F403
from .ops._backend import BackendUnavailableError
from .queues import ClassQueue, FeatureQueue, momentum_update

__all__ = [
    "BackendUnavailableError",
    "ClassQueue",
    "FeatureQueue",
    "__version__",
    "datasets",
    "functional",
    "info",
    "losses",
    "mixing",
    "momentum_update",
    "plan_linear",
    "priors",
    "queues",
    "schedules",
    "set_checks",
    "set_gradient_policy",
    "set_memory_budget",
    "use_backend",
]
__all__ += losses.__all__

_ON_DEMAND = ("metrics", "testing")  # not imported with the package: they need, or are, more than training does


def __getattr__(name: str) -> ModuleType:
    if name in _ON_DEMAND:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
