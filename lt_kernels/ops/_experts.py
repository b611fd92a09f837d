"""Logits of several experts as the expert operators take them: one [E, N, C] tensor, or E tensors [N, C]."""

from __future__ import annotations

import torch
from torch import Tensor


def experts_of(logits: list[Tensor]) -> list[Tensor]:
    """The experts' logits, each [N, C]: views where they were given as one tensor."""
    return list(logits[0].unbind(0)) if logits[0].dim() == 3 else list(logits)


def shape_of(logits: list[Tensor]) -> tuple[int, int, int]:
    """(E, N, C)."""
    if logits[0].dim() == 3:
        e, n, c = logits[0].shape
        return e, n, c
    n, c = logits[0].shape
    return len(logits), n, c


def empty_gradient(logits: list[Tensor]) -> Tensor:
    """Where the gradients of all experts go, [E, N, C]: laid out like the logits if they are one tensor."""
    if logits[0].dim() == 3:
        return torch.empty_like(logits[0])
    return logits[0].new_empty(shape_of(logits))


def per_argument(gradient: Tensor, logits_are_one: bool) -> list[Tensor]:
    """The gradient [E, N, C] as one for each tensor of the argument."""
    return [gradient] if logits_are_one else list(gradient.unbind(0))
