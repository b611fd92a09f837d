"""Gradients compared with finite differences, and with those of fewer rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lt_kernels.testing import Sample


def gradcheck(
    function: Callable[..., Tensor | tuple[Tensor, ...]], sample: Sample, every_element: bool = False
) -> None:
    """Check ``function(**arguments)`` for the sample's differentiable tensors.

    Each tensor is moved in one random direction, or each of its elements on its own.
    """
    names = list(sample.differentiable)

    def call(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        return function(**{**sample.named, **dict(zip(names, leaves, strict=True))})

    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in sample.differentiable.values())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=not every_element)


def check_rows_apart(function: Callable[..., Tensor], sample: Sample, dim: int = 0, rows: int = 50) -> None:
    """Hold the gradient of a sum over many rows (dimension ``dim``) to the bits of the same rows a few at a time."""

    def gradient(begin: int, end: int) -> Tensor:
        x = sample.input.detach().narrow(dim, begin, end - begin).requires_grad_()
        labels = {name: sample.named[name][begin:end] for name in ("target", "mixed_target") if name in sample.named}
        return torch.autograd.grad(function(**{**sample.named, "input": x, **labels}, reduction="sum"), x)[0]

    count = sample.input.shape[dim]
    apart = torch.cat([gradient(i, min(i + rows, count)) for i in range(0, count, rows)], dim)
    assert torch.equal(gradient(0, count), apart)
