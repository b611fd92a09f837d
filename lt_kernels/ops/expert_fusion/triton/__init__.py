"""The Triton backend of expert_fusion."""

from .forward import forward

__all__ = ["forward"]
