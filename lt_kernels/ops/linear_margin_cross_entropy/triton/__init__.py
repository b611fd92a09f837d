"""The Triton backend of linear_margin_cross_entropy: the tiled strategy."""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
