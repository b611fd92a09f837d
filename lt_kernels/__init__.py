"""Fused losses for training classifiers on long-tailed labels with very many classes."""

from __future__ import annotations

from . import functional
from ._info import info
from ._settings import set_checks, set_gradient_policy, use_backend
from ._version import __version__
from .ops._backend import BackendUnavailableError

__all__ = [
    "BackendUnavailableError",
    "__version__",
    "functional",
    "info",
    "set_checks",
    "set_gradient_policy",
    "use_backend",
]
