"""The Triton backend of expert_divergence."""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
