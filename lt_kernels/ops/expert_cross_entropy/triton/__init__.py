"""The Triton backend of expert_cross_entropy."""

from .forward import forward

__all__ = ["forward"]
