"""Contrastive losses against dense definitions with masks: inputs, and the check in the error budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import COUNTS
from torch import Tensor

from lt_kernels.testing import assert_within_budget

INAT = [1000.0 / (c + 1) + 2 for c in range(8142)]

Leaves = dict[str, Tensor]


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def random_labels(size: int, classes: int, seed: int) -> Tensor:
    return torch.randint(0, classes, (size,), generator=torch.Generator().manual_seed(seed))


def run(function: Callable[..., Tensor], leaves: Leaves) -> tuple[Tensor, Leaves]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    value = function(**leaves)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    gradients = torch.autograd.grad((value * upstream).sum(), list(leaves.values()), allow_unused=True)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return value.detach(), {k: zeros[k] if g is None else g for k, g in zip(leaves, gradients, strict=True)}


def check(loss: Callable[..., Tensor], dense: Callable[..., Tensor], dtype: torch.dtype, **leaves: Tensor) -> None:
    """Value and every gradient against the dense definition in float64; its own error in ``dtype`` beside.

    Similarities of half-precision vectors are products in that dtype, whose roundings the value may show too.
    """
    given = {name: value.to(dtype) for name, value in leaves.items()}
    value, gradients = run(loss, given)
    eager, of_eager = run(dense, given)
    truth, exact = run(dense, {name: leaf.double() for name, leaf in given.items()})
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype in (torch.bfloat16, torch.float16)
    roundings = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if half else None
    assert_within_budget(value, eager, truth, "value", roundings=roundings)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_within_budget(gradient, of_eager[name], exact[name], f"gradient of {name}")


def check_formula(loss: Callable[[Tensor], Tensor], formula: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> None:
    """Check ``loss(x)`` against ``formula(x, counts)``."""
    check(lambda x: loss(x), lambda x: formula(x, counts_like(COUNTS, x)), x.dtype, x=x)


every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["fp64", "fp32", "bf16", "fp16"]
)
exact_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def counts_like(values: Any, x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(x)
