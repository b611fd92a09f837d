"""The Triton backend of contrastive_loss."""

from .loss import backward, forward

__all__ = ["backward", "forward"]
