"""The Triton backend of partitioned_logsumexp."""

from .backward import backward, tiled_backward
from .forward import forward, tiled_forward
from .rows import results, terms

__all__ = ["backward", "forward", "results", "terms", "tiled_backward", "tiled_forward"]
