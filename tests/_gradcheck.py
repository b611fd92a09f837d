"""``torch.autograd.gradcheck`` of a loss of rows: every argument is moved in a random direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lt_kernels.testing import Sample


def gradcheck(function: Callable[..., Tensor | tuple[Tensor, ...]], sample: Sample) -> None:
    """Check the gradients of ``function(**arguments)`` for the sample's differentiable tensors."""
    names = list(sample.differentiable)

    def call(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        return function(**{**sample.named, **dict(zip(names, leaves, strict=True))})

    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in sample.differentiable.values())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
